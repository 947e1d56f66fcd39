"""Background tasks that are watched: one that dies is logged and started again."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable

from events.clock import Clock

_log = logging.getLogger(__name__)

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
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

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


def is_cancelled() -> bool:
    """Whether somebody cancelled the current task; a library may raise `CancelledError` without that."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
