"""The ledger application, in a process that fails at a given place: only this module reads CRASH_AT.

CRASH_AT is a list like `handler.before_commit:kill:2,retries.claimed:raise:1`: the place, what happens there, and at
which time of coming there. Each happens once, whatever is started again: CRASH_MARKS is the folder of those that have
happened.

CRASH_PLANT takes one defence away, to show that the checks find that; see `PLANTS`. CRASH_LEASE is how many seconds a
lease lasts, where nobody has the time to wait for those of production.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from events import relay
from events.database import transaction
from events.failpoints import armed
from events.intake import Item
from events.relay import Entry, Relay, RelayOptions
from handlers import group, retries
from handlers.inbox import NOTHING, Inbox, Known, Recorded
from handlers.outcome import Outcome
from handlers.recording import Recorder
from handlers.runner import HandlerRunner
from tests.support.ledger_app import app

__all__ = ["app"]


def first(mark: Path) -> bool:
    """Say whether nobody was here before, and leave a mark."""
    if mark.exists():
        return False
    mark.touch()
    return True


def arm(stack: ExitStack, place: str, what: str, hit: int, mark: Path) -> None:
    hits = 0

    async def act() -> None:
        nonlocal hits
        hits += 1
        if what == "terminate" and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            return  # it still starts, and would be killed instead of asked
        if hits < hit or not first(mark):
            return
        match what:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":  # until somebody lets it go on
                os.kill(os.getpid(), signal.SIGSTOP)
            case "terminate":  # as an operator does
                os.kill(os.getpid(), signal.SIGTERM)
            case "stall":  # for longer than the deadlines of a case that is about them
                await asyncio.sleep(3)
            case "raise":
                raise RuntimeError(f"planned, at {place}")
            case "cancel":
                raise asyncio.CancelledError  # as a library does that loses its connection

    stack.enter_context(armed(place, act))


def plant_ack_first() -> None:
    """Acknowledge on receipt: before anything is done, let alone committed."""
    find_known: Callable[..., Awaitable[Any]] = HandlerRunner._find_known

    async def ack_first(self: HandlerRunner, items: Sequence[Item]) -> Any:
        for item in items:
            await item.delivery.ack()
        return await find_known(self, items)

    patch.object(HandlerRunner, "_find_known", ack_first).start()


def plant_delete_first() -> None:
    """Delete from the outbox before the bus has confirmed."""
    publish: Callable[..., Awaitable[int]] = Relay._publish

    async def delete_first(self: Relay, entries: list[Entry]) -> int:
        self._confirmed.extend(entry.id for entry in entries)
        await self._delete_confirmed()
        return await publish(self, entries)

    patch.object(Relay, "_publish", delete_first).start()


def plant_no_inbox() -> None:
    """Record what was handled, and look there neither before a message is run nor when it is recorded."""
    record: Callable[..., Awaitable[object]] = Inbox.record

    async def nothing(*_: object) -> Known:
        return NOTHING

    async def all_new(
        self: Inbox, connection: AsyncConnection, handled: Sequence[Recorded], now: datetime
    ) -> set[UUID]:
        await record(self, connection, handled, now)
        return {each.key for each in handled}

    patch.object(Inbox, "find", nothing).start()
    patch.object(Inbox, "record", all_new).start()


def plant_no_outbox() -> None:
    """Hand messages over in memory, and leave nothing in the outbox for those who come after a crash."""

    async def nothing(*_: object, **__: object) -> None:
        return

    patch.object(relay, "insert_entries", nothing).start()


def plant_two_transactions() -> None:
    """Record a message in another transaction than that of its effect."""
    store: Callable[..., Awaitable[Any]] = Recorder.store

    async def apart(self: Recorder, _connection: AsyncConnection, outcomes: Sequence[Outcome], *, has_run: bool) -> Any:
        async with transaction(self._engine) as other:
            return await store(self, other, outcomes, has_run=has_run)

    patch.object(Recorder, "store", apart).start()


def shorten_leases(seconds: float) -> None:
    """Let rows of the outbox and tries belong to this process for a shorter time."""
    patch.object(relay, "RelayOptions", partial(RelayOptions, lease=seconds)).start()
    patch.object(retries, "LEASE", seconds).start()
    patch.object(group, "LEASE", seconds).start()
    patch.object(group, "_RENEW_EVERY", seconds / 3).start()


PLANTS = {
    "ack_first": plant_ack_first,
    "delete_first": plant_delete_first,
    "no_inbox": plant_no_inbox,
    "no_outbox": plant_no_outbox,
    "two_transactions": plant_two_transactions,
}

_stack = ExitStack()  # armed for as long as the process lives
for _number, _each in enumerate(filter(None, os.environ.get("CRASH_AT", "").split(","))):
    _place, _what, _hit = _each.split(":")
    arm(_stack, _place, _what, int(_hit), Path(os.environ["CRASH_MARKS"]) / f"{_number}")
if _plant := os.environ.get("CRASH_PLANT"):
    PLANTS[_plant]()
if _lease := os.environ.get("CRASH_LEASE"):
    shorten_leases(float(_lease))
