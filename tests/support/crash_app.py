"""The ledger application, in a process that fails at a given place: only this module reads CRASH_AT.

CRASH_AT is a list like `handler.before_commit:kill:2,retries.claimed:raise:1`: the place, what happens there (kill,
kill_late, raise, cancel), and at which time of coming there. Each happens once, whatever is started again: CRASH_MARKS
is the folder of those that have happened.

CRASH_PLANT plants a bug, to show that the checks find it: `ack_first` acknowledges on receipt, `delete_first` deletes
from the outbox before the confirm.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from events.failpoints import armed
from events.intake import Item
from events.relay import Entry, Relay
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
        if hits < hit or not first(mark):
            return
        match what:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "kill_late":  # when the outbox is tidied up, which would send the message again
                await asyncio.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)
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

    HandlerRunner._find_known = ack_first  # type: ignore[method-assign]  # that is the point


def plant_delete_first() -> None:
    """Delete from the outbox before the bus has confirmed."""
    publish: Callable[..., Awaitable[int]] = Relay._publish

    async def delete_first(self: Relay, entries: list[Entry]) -> int:
        self._confirmed.extend(entry.id for entry in entries)
        await self._delete_confirmed()
        return await publish(self, entries)

    Relay._publish = delete_first  # type: ignore[method-assign]  # that is the point


_stack = ExitStack()  # armed for as long as the process lives
for _number, _each in enumerate(filter(None, os.environ.get("CRASH_AT", "").split(","))):
    _place, _what, _hit = _each.split(":")
    arm(_stack, _place, _what, int(_hit), Path(os.environ["CRASH_MARKS"]) / f"{_number}")
match os.environ.get("CRASH_PLANT"):
    case "ack_first":
        plant_ack_first()
    case "delete_first":
        plant_delete_first()
