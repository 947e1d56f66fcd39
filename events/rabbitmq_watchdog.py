"""Looks for parts of the bus that are broken and were not restored, and starts them again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from events.clock import Clock
from events.errors import CoordinatorError
from events.rabbitmq_topology import library_errors

_log = logging.getLogger(__name__)

Restart = Callable[[], Awaitable[None]]
Broken = Mapping[Restart, str]
"""How each part that is broken is started again, and what it is called."""


class Watchdog:
    """Starts again what is broken at two looks in a row: aio-pika has had its time then.

    Attributes:
        failures: what could not be mended, by its name.

    Args:
        is_up: says whether the connections are up. Nothing can be told while they are not.
        renew: is called while they are not.
        broken: looks at this side.
        reconcile: looks at the other side, which costs more.
        clock: the time for pauses.
        every: seconds between looks.
        reconcile_every: seconds between looks at the other side.
        timeout: seconds for a start.
    """

    def __init__(
        self,
        *,
        is_up: Callable[[], bool],
        renew: Callable[[], None],
        broken: Callable[[], Awaitable[Broken]],
        reconcile: Callable[[], Awaitable[Broken]],
        clock: Clock,
        every: float,
        reconcile_every: float,
        timeout: float,
    ) -> None:
        self.failures: dict[str, str] = {}
        self._is_up = is_up
        self._renew = renew
        self._broken = broken
        self._reconcile = reconcile
        self._clock = clock
        self._every = every
        self._reconcile_every = reconcile_every
        self._timeout = timeout

    async def run(self) -> None:
        """Look again and again, for ever."""
        suspects: Broken = {}
        unserved: Broken = {}
        reconciled = self._clock.monotonic()
        while True:
            await self._clock.sleep(self._every)
            if not self._is_up():
                suspects = unserved = {}
                self.failures.clear()
                self._renew()
                continue
            suspects = await self._restart_known(await self._broken(), suspects)
            if self.failures or self._clock.monotonic() - reconciled >= self._reconcile_every:
                unserved = await self._restart_known(await self._reconcile(), unserved)
                reconciled = self._clock.monotonic()

    async def _restart_known(self, broken: Broken, before: Broken) -> Broken:
        """Start again what is `broken` and was so `before`; return the former."""
        for restart, name in before.items():
            if restart in broken:
                await self._restart(restart, name)
            else:
                self.failures.pop(name, None)
        return broken

    async def _restart(self, restart: Restart, name: str) -> None:
        _log.warning("%s was lost and is started again", name, extra={"action": "bus.restarted", "part": name})
        try:
            with library_errors(f"start {name} again"):
                async with asyncio.timeout(self._timeout):
                    await restart()
        except CoordinatorError as error:
            _log.error("%s", error, extra={"action": "bus.restart_failed", "part": name})
            self.failures[name] = str(error)
        else:
            self.failures.pop(name, None)
