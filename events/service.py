"""Background tasks that are watched: one that dies is logged and started again."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from events.clock import Clock

_log = logging.getLogger(__name__)

_CANCEL_AGAIN = 3.0  # seconds

Run = Callable[[], Awaitable[None]]


class Supervisor:
    """Runs named background tasks until `stop()`.

    A task that raises is started again after a pause that doubles with every failure in a row; a task that
    returns is done. `start()` after `stop()` begins anew.

    Args:
        clock: measures the pauses.
        first_pause: seconds before the first restart.
        longest_pause: seconds that no pause exceeds; a task that ran for longer than this starts over at `first_pause`.
    """

    def __init__(self, clock: Clock, *, first_pause: float = 0.1, longest_pause: float = 30.0) -> None:
        self._clock = clock
        self._first_pause = first_pause
        self._longest_pause = longest_pause
        self._tasks: set[asyncio.Task[None]] = set()
        self._failing: set[str] = set()
        self.restarts: Counter[str] = Counter()

    @property
    def failing(self) -> frozenset[str]:
        """The names of the tasks that have failed and wait to be started again."""
        return frozenset(self._failing)

    def start(self, name: str, run: Run) -> None:
        """Run `run()` as a task called `name`."""
        task = asyncio.get_running_loop().create_task(self._watch(name, run), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Cancel all tasks; returns when they have ended. Stopping twice, or before any start, is fine."""
        await cancel_all(self._tasks)

    async def _watch(self, name: str, run: Run) -> None:
        failures = 0
        while not is_cancelled():
            started = self._clock.monotonic()
            try:
                await run()
            except (KeyboardInterrupt, SystemExit, GeneratorExit):
                raise
            except BaseException as error:  # noqa: BLE001  # Rust extensions panic with a BaseException
                # A library that loses its connection raises CancelledError into us: only our own cancel ends the task.
                if is_cancelled():
                    return
                if self._clock.monotonic() - started > self._longest_pause:
                    failures = 0
                pause = min(self._longest_pause, self._first_pause * 2.0**failures)
                failures = min(failures + 1, 64)
                self.restarts[name] += 1
                _log.exception(
                    "%s failed and is started again in %.1f s",
                    name,
                    pause,
                    exc_info=error,
                    extra={"action": "task_restarted", "task": name, "restarts": self.restarts[name]},
                )
            else:
                return
            self._failing.add(name)
            try:
                await self._clock.sleep(pause)
            finally:
                self._failing.discard(name)


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel `tasks` and return when they have ended.

    A cancel can get lost: it arrives while a driver cleans up after an error, comes out as that error, and the task
    takes it for one that is worth another try. So whoever has not ended is cancelled again.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN)
        for task in pending:
            _log.warning("%s has not ended yet and is cancelled again", task.get_name(), extra={"action": "task_stuck"})


def is_cancelled() -> bool:
    """Whether somebody cancelled the current task; a library may raise `CancelledError` without that."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
