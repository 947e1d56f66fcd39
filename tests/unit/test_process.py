"""What a process does before it works."""

import logging
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from coordinator.process import enter_when_up, exits_when_stalled, log_to_stderr
from events.errors import BusClosedError, ConfigurationError
from tests.support.flows import ManualClock


class Server:
    """Refuses as often as it is told to."""

    def __init__(self, *errors: Exception) -> None:
        self.errors: Iterator[Exception] = iter(errors)
        self.tries = 0
        self.closed = False

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        self.tries += 1
        if error := next(self.errors, None):
            raise error
        yield "open"
        self.closed = True


async def enter(server: Server, patience: float) -> tuple[str, list[float]]:
    clock = ImpatientClock()
    async with AsyncExitStack() as stack:
        found = await enter_when_up(stack, server.open, patience=patience, clock=clock)
        assert not server.closed
    assert server.closed
    return found, clock.pauses


class ImpatientClock(ManualClock):
    """Time passes as soon as somebody sleeps."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.advance(seconds)


async def test_a_server_that_is_not_up_yet_is_waited_for_with_growing_pauses() -> None:
    server = Server(BusClosedError("no broker"), ConnectionRefusedError(), *[TimeoutError()] * 4)
    assert await enter(server, 60) == ("open", [0.5, 1.0, 2.0, 4.0, 5.0, 5.0])


async def test_patience_has_an_end() -> None:
    server = Server(*[BusClosedError("no broker")] * 100)
    with pytest.raises(BusClosedError, match="no broker"):
        await enter(server, 3)
    assert server.tries == 4


async def test_what_waiting_does_not_change_is_an_error_at_once() -> None:
    server = Server(ConfigurationError("wrong password"))
    with pytest.raises(ConfigurationError, match="wrong password"):
        await enter(server, 60)
    assert server.tries == 1


async def test_without_patience_there_is_one_try() -> None:
    server = Server(BusClosedError("no broker"))
    with pytest.raises(BusClosedError):
        await enter(server, 0)
    assert server.tries == 1


async def test_a_stalled_process_is_still_watched_for_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the watch was not wound up again after one, and ended a process whose loop ran."""
    errors: Iterator[Exception] = iter([OSError("no such file")])
    wound_up = 0

    def wind_up(*_: object, **__: object) -> None:
        nonlocal wound_up
        if error := next(errors, None):
            raise error
        wound_up += 1

    monkeypatch.setattr("coordinator.process.sys.stderr", sys.__stderr__)
    monkeypatch.setattr("coordinator.process.faulthandler.dump_traceback_later", wind_up)
    clock = ManualClock()
    async with exits_when_stalled(60, clock):
        await clock.pass_sleep(0.1)  # the supervisor's
        await clock.pass_sleep(5.0)
        await clock.asleep(5.0)
    assert wound_up == 2


def test_what_is_logged_neither_steers_the_terminal_nor_looks_like_another_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    for name in (None, "aio_pika", "alembic", "httpx2", "httpcore2", "aiormq"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "level", logger.level)
    log_to_stderr("INFO", "text")
    error = ValueError("\x1b[2J\n2026-11-26 09:00:00,000 INFO    shop: all is well")
    forged = "no \x1b]0;x\x07\n2026-11-26 09:00:00,000 INFO    shop: all is well"
    logging.getLogger("shop").error(forged, exc_info=error)
    first, *stack = capsys.readouterr().err.splitlines()
    assert first.endswith(r"ERROR   shop: no \x1b]0;x\x07\n2026-11-26 09:00:00,000 INFO    shop: all is well")
    assert all(line.startswith("  ") for line in stack)
    assert r"  ValueError: \x1b[2J" in stack


class Alarm:
    """Goes off unless it is wound up again or put away in time, as that of faulthandler does."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.due: float | None = None

    def dump_traceback_later(self, seconds: float, *, exit: bool, file: object) -> None:
        assert exit
        assert file is not None
        assert self.due is None or self.due > self.clock.monotonic()
        self.due = self.clock.monotonic() + seconds

    def cancel_dump_traceback_later(self) -> None:
        self.due = None


@pytest.fixture
def alarm(monkeypatch: pytest.MonkeyPatch) -> Alarm:
    made = Alarm(ManualClock())
    monkeypatch.setattr("coordinator.process.sys.stderr", sys.__stderr__)
    monkeypatch.setattr("coordinator.process.faulthandler", made)
    return made


@pytest.mark.parametrize(("limit", "every"), [(0.8, 0.2), (60, 5.0)])
async def test_a_loop_that_is_slow_and_not_stuck_goes_on_and_nobody_watches_it_in_the_end(
    alarm: Alarm, limit: float, every: float
) -> None:
    async with exits_when_stalled(limit, alarm.clock):
        for _ in range(10):
            await alarm.clock.asleep(every)
            assert alarm.due == alarm.clock.monotonic() + limit
            alarm.clock.advance(0.9 * limit)
    assert alarm.due is None


async def test_without_a_limit_nobody_watches(alarm: Alarm) -> None:
    async with exits_when_stalled(0, alarm.clock):
        assert alarm.due is None
    assert alarm.clock.sleeps == 0
