"""The database's time, without asking for it each time.

Leases and deadlines count on one clock that all processes share: the database's. It is asked now and then;
in between the machine's monotonic clock carries it on, so a jump of the local time of day changes nothing.
"""

from datetime import datetime, timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from events.clock import Clock

_CALIBRATE_EVERY = 30.0


class StoreClock:
    """Tells the time of a PostgreSQL server; of SQLite, which has none of its own, the time of `clock`."""

    def __init__(self, engine: AsyncEngine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._shared = engine.dialect.name == "postgresql"
        self._base = clock.now()
        self._asked_at = clock.monotonic()

    async def calibrate(self) -> None:
        """Ask the database for its time."""
        if not self._shared:
            return
        async with self._engine.connect() as connection:
            before = self._clock.monotonic()
            base = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
            self._base, self._asked_at = base, (before + self._clock.monotonic()) / 2

    async def calibrate_if_old(self) -> None:
        """Ask again if the last answer is older than half a minute."""
        if self._clock.monotonic() - self._asked_at > _CALIBRATE_EVERY:
            await self.calibrate()

    def now(self) -> datetime:
        """Return the database's time."""
        if not self._shared:
            return self._clock.now()
        return self._base + timedelta(seconds=self._clock.monotonic() - self._asked_at)
