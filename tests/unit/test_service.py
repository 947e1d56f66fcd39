"""Background tasks: what dies comes back, what is stopped has stopped."""

import asyncio
import logging

import pytest

from events import service
from events.clock import SystemClock
from events.service import Supervisor


class RecordingClock(SystemClock):
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 0.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


async def forever() -> None:
    await asyncio.Event().wait()


@pytest.fixture
def clock() -> RecordingClock:
    return RecordingClock()


async def test_a_task_that_raises_is_logged_and_started_again_after_growing_pauses(
    clock: RecordingClock, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor = Supervisor(clock, first_pause=1, longest_pause=5)
    runs = 0
    done = asyncio.Event()

    async def fail_five_times() -> None:
        nonlocal runs
        runs += 1
        if runs <= 5:
            raise RuntimeError("broken")
        done.set()

    supervisor.start("worker", fail_five_times)
    async with asyncio.timeout(5):
        await done.wait()
    assert clock.pauses == [1, 2, 4, 5, 5]
    assert supervisor.restarts["worker"] == 5
    assert {getattr(record, "action", None) for record in caplog.records} == {"task_restarted"}
    assert caplog.records[0].exc_info is not None
    await supervisor.stop()


async def test_a_task_that_ran_long_enough_starts_over_with_a_short_pause(clock: RecordingClock) -> None:
    supervisor = Supervisor(clock, first_pause=1, longest_pause=5)
    runs = 0
    done = asyncio.Event()

    async def run_longer_each_time() -> None:
        nonlocal runs
        runs += 1
        if runs == 5:
            done.set()
            return
        clock.time += 0 if runs < 4 else 60
        raise RuntimeError("broken")

    supervisor.start("worker", run_longer_each_time)
    async with asyncio.timeout(5):
        await done.wait()
    assert clock.pauses == [1, 2, 4, 1]


async def test_a_cancellation_that_nobody_asked_for_does_not_end_a_task(clock: RecordingClock) -> None:
    """aio-pika raises CancelledError into whoever waits when a stalled connection is given up."""
    supervisor = Supervisor(clock)
    runs = 0
    done = asyncio.Event()

    async def lose_the_connection() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            answer.cancel()
            await answer
        done.set()

    supervisor.start("worker", lose_the_connection)
    async with asyncio.timeout(5):
        await done.wait()
    assert supervisor.restarts["worker"] == 1


async def test_an_error_that_is_no_exception_is_survived_too(clock: RecordingClock) -> None:
    class PanicError(BaseException):
        """What Rust extensions raise."""

    supervisor = Supervisor(clock)
    runs = 0
    done = asyncio.Event()

    async def panic() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise PanicError
        done.set()

    supervisor.start("worker", panic)
    async with asyncio.timeout(5):
        await done.wait()


async def test_a_task_that_waits_to_be_started_again_counts_as_failing() -> None:
    class StoppedClock(SystemClock):
        async def sleep(self, seconds: float) -> None:  # noqa: ARG002  # the port's
            sleeping.set()
            await asyncio.Event().wait()

    sleeping = asyncio.Event()
    supervisor = Supervisor(StoppedClock())

    async def fail() -> None:
        raise RuntimeError("broken")

    supervisor.start("worker", fail)
    supervisor.start("other", forever)
    async with asyncio.timeout(5):
        await sleeping.wait()
    assert supervisor.failing == {"worker"}
    await supervisor.stop()
    assert supervisor.failing == frozenset()


async def test_a_task_that_returns_is_done(clock: RecordingClock, caplog: pytest.LogCaptureFixture) -> None:
    supervisor = Supervisor(clock)
    runs = 0

    async def run_once() -> None:
        nonlocal runs
        runs += 1

    with caplog.at_level(logging.DEBUG, "events"):
        supervisor.start("worker", run_once)
        for _ in range(5):
            await asyncio.sleep(0)
    assert runs == 1
    assert caplog.records == []


async def test_stop_returns_when_the_tasks_have_ended(clock: RecordingClock) -> None:
    supervisor = Supervisor(clock)
    started, ended = asyncio.Event(), False

    async def tidy_up() -> None:
        nonlocal ended
        try:
            started.set()
            await forever()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            ended = True

    supervisor.start("worker", tidy_up)
    await started.wait()
    await supervisor.stop()
    assert ended


async def test_a_task_that_swallows_its_cancellation_is_not_started_again(clock: RecordingClock) -> None:
    supervisor = Supervisor(clock)
    started = asyncio.Event()
    runs = 0

    async def swallow() -> None:
        nonlocal runs
        runs += 1
        started.set()
        try:
            await forever()
        except asyncio.CancelledError:
            raise RuntimeError("instead") from None

    supervisor.start("worker", swallow)
    await started.wait()
    async with asyncio.timeout(5):
        await supervisor.stop()
    assert runs == 1


async def test_stopping_before_starting_and_twice_is_fine_and_starting_again_works(clock: RecordingClock) -> None:
    supervisor = Supervisor(clock)
    await supervisor.stop()
    supervisor.start("worker", forever)
    await supervisor.stop()
    await supervisor.stop()
    done = asyncio.Event()

    async def run() -> None:
        done.set()

    supervisor.start("worker", run)
    async with asyncio.timeout(5):
        await done.wait()


async def test_a_cancel_that_a_task_takes_for_an_error_is_repeated(
    clock: RecordingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives while a driver cleans up, comes out as an error of that driver, and looks worth another try."""
    monkeypatch.setattr(service, "_CANCEL_AGAIN", 0.01)
    supervisor = Supervisor(clock)
    running = asyncio.Event()
    lost: list[str] = []

    async def work() -> None:
        while True:
            try:
                running.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if lost:
                    raise
                lost.append("once")

    supervisor.start("stubborn", work)
    await running.wait()
    async with asyncio.timeout(30):
        await supervisor.stop()
    assert lost == ["once"]
