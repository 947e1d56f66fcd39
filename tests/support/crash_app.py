"""The ledger application, in a process that fails at a given place: only this module reads CRASH_AT.

CRASH_AT is a list like `handler.before_commit:kill:2,engine.after_commit:raise:1:refund`: the place, what happens
there, at which time of coming there, and, if given, what must have been entered in the ledger of third parties before
that counts. Each happens once, whatever is started again: CRASH_MARKS is the folder of those that have happened.
What happens: `kill` as kill -9, `raise` an error, `cancel` as a library that loses its connection, `stop` the process
stands still for longer than its leases last, and then goes on.

CRASH_POISON is the number of an order that kills the process whenever its saga is decided on. CRASH_PLANT plants a
bug, to show that the checks find it: see the functions `plant_...`.

Leases are short here, so that what a dead process held is soon taken over. Everything else is as in production.
"""

import asyncio
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

import events.relay
import handlers.group
import handlers.retries
from coordinator.engine import Engine
from events.bus import Delivery
from events.failpoints import armed
from events.intake import Item, settle
from events.outbox import AfterCommit, Outbound
from events.relay import Entry, Relay
from handlers import handles
from handlers.recording import Recorder
from tests.support import ledger_app
from tests.support.ledger_app import Ledger, Order, OrderDone, OrderUndone, Reserve, inside

__all__ = ["app"]

LEASE = 4.0  # seconds
STOP = LEASE + 2
WITNESSES = ("done", "undone")


@handles(OrderDone)
async def witness_done(event: OrderDone, session: AsyncSession) -> None:
    await session.execute(inside.insert().values(order_id=event.order_id, what="done"))


@handles(OrderUndone)
async def witness_undone(event: OrderUndone, session: AsyncSession) -> None:
    await session.execute(inside.insert().values(order_id=event.order_id, what="undone"))


app = replace(ledger_app.app, handlers=[*ledger_app.app.handlers, witness_done, witness_undone])

_entered: set[str] = set()


class WatchedLedger(Ledger):
    async def enter(self, key: str, order_id: UUID, what: str) -> None:
        await super().enter(key, order_id, what)
        _entered.add(what)


def shorten_leases() -> None:
    handlers.retries.LEASE = LEASE
    handlers.group._RENEW_EVERY = LEASE / 3
    events.relay.RelayOptions = partial(events.relay.RelayOptions, lease=LEASE)  # type: ignore[assignment,misc]


def first(mark: Path) -> bool:
    """Say whether nobody was here before, in this process or another, and leave a mark."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def arm(stack: ExitStack, mark: Path, place: str, what: str, hit: str, after: str = "") -> None:
    hits = 0

    async def act() -> None:
        nonlocal hits
        if after and after not in _entered:
            return
        hits += 1
        if hits < int(hit) or not first(mark):
            return
        match what:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise RuntimeError(f"planned, at {place}")
            case "cancel":
                raise asyncio.CancelledError
            case "stop":
                subprocess.Popen(["/bin/sh", "-c", f"sleep {STOP}; kill -CONT {os.getpid()}"])  # noqa: ASYNC220
                os.kill(os.getpid(), signal.SIGSTOP)
            case _:
                raise ValueError(what)

    stack.enter_context(armed(place, act))


def poison(number: int) -> None:
    """Let the code of one saga kill whatever process decides on it."""
    reserve_goods = Order.reserve_goods.function

    def kill(self: Order) -> Reserve:
        if self.number == number:
            os.kill(os.getpid(), signal.SIGKILL)
        made: Reserve = reserve_goods(self)
        return made

    Order.reserve_goods.function = kill


def plant_ack_first() -> None:
    """Acknowledge what a handler has done before it is committed."""
    for name in ("commit", "store"):
        method: Callable[..., Awaitable[Any]] = getattr(Recorder, name)

        async def ack_first(*arguments: Any, method: Callable[..., Awaitable[Any]] = method, **options: Any) -> Any:
            outcomes: Sequence[Any] = arguments[-1]
            await settle([outcome.item for outcome in outcomes])
            return await method(*arguments, **options)

        setattr(Recorder, name, ack_first)


def plant_engine_ack_first() -> None:
    """Acknowledge what the coordinator is given before what follows from it is committed."""
    process = Engine._process

    async def ack_first(self: Engine, items: list[Item]) -> None:
        await settle(items)
        await process(self, items)

    Engine._process = ack_first  # type: ignore[method-assign]  # that is the point


def plant_delete_first() -> None:
    """Delete from the outbox before the bus has confirmed."""
    publish: Callable[..., Awaitable[int]] = Relay._publish

    async def delete_first(self: Relay, entries: list[Entry]) -> int:
        self._confirmed.extend(entry.id for entry in entries)
        await self._delete_confirmed()
        return await publish(self, entries)

    Relay._publish = delete_first  # type: ignore[method-assign]  # that is the point


def plant_no_outbox() -> None:
    """Publish after the commit, from memory only."""

    async def write(
        self: Relay, connection: AsyncConnection, messages: Sequence[Outbound], settling: Sequence[Delivery] = ()
    ) -> AfterCommit:
        del connection, settling
        entries = [
            Entry(self._ids.new(), each.address, each.bundle, each.encode(self._limits), None, None)
            for each in messages
        ]
        return lambda: self._hand_over(self._store_clock.now() + self._lease, entries) if entries else None

    Relay.write = write  # type: ignore[method-assign]  # that is the point


def plant_effect_apart() -> None:
    """Commit what a handler does apart from the record that it was done."""

    async def enter(session: AsyncSession, order_id: UUID, what: str) -> None:
        engine = (await session.connection()).engine
        async with engine.begin() as connection:
            statement = text("INSERT INTO ledger_inside (order_id, what) VALUES (:order_id, :what)")
            await connection.execute(statement, {"order_id": order_id, "what": what})

    ledger_app._enter = enter


PLANTS: dict[str, Callable[[], None]] = {
    "": lambda: None,
    "ack_first": plant_ack_first,
    "engine_ack_first": plant_engine_ack_first,
    "delete_first": plant_delete_first,
    "no_outbox": plant_no_outbox,
    "effect_apart": plant_effect_apart,
}

_stack = ExitStack()  # armed for as long as the process lives
if marks := os.environ.get("CRASH_MARKS"):  # the tests themselves import this, too, and stay alive
    shorten_leases()
    ledger_app.Ledger = WatchedLedger  # type: ignore[misc]  # what the provider makes
    for _number, _each in enumerate(filter(None, os.environ.get("CRASH_AT", "").split(","))):
        arm(_stack, Path(marks) / f"{_number}", *_each.split(":"))
    if _poison := os.environ.get("CRASH_POISON"):
        poison(int(_poison))
    PLANTS[os.environ.get("CRASH_PLANT", "")]()
