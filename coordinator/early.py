"""Gives events that were parked, since no instance waited for them, to those that do by now."""

import asyncio
import logging
from collections.abc import Collection
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from coordinator.arrivals import Arrivals
from coordinator.facts import NOTHING, Lookups
from coordinator.sagas import Sagas
from coordinator.store import Store
from coordinator.waiting import EarlyDelivery, Waiters
from coordinator.writer import Writer
from events.bulk import together
from events.clock import Clock
from events.database import is_transient, transaction
from events.errors import StaleRowError
from events.intake import Intake
from events.service import is_cancelled

logger = logging.getLogger(__name__)

_BATCH = 256
_SWEEP_EVERY = 5.0  # for events whose match was missed by a process that has died since
_SHARE = 20  # of the time: with very many events that nobody waits for, a sweep takes long
_MOST = 1000  # correlations that are looked at together


class EarlyEvents:
    """Takes parked events that somebody waits for, and deletes those that nobody has waited for in time.

    Args:
        writer, lookups, waiters, store, engine: the database and what is written there.
        sagas: the definitions.
        intake: reads what was parked.
        clock: the time here, for pauses.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        lookups: Lookups,
        waiters: Waiters,
        sagas: Sagas,
        engine: AsyncEngine,
        store: Store,
        intake: Intake,
        clock: Clock,
    ) -> None:
        self._writer = writer
        self._lookups = lookups
        self._waiters = waiters
        self._sagas = sagas
        self._engine = engine
        self._store = store
        self._intake = intake
        self._clock = clock

    async def run(self) -> None:
        """Look at what may match as soon as it may, and at all there is now and then, for ever."""
        among, sweep_at = None, 0.0
        while True:
            begun = self._clock.monotonic()
            try:
                while await self.take(among=among) == _BATCH:
                    pass
                while among is None and await self._expire() == _BATCH:
                    pass
            except Exception as error:
                if is_cancelled() or not (is_transient(error) or isinstance(error, StaleRowError)):
                    raise
                logger.warning(
                    "early events wait for the database: %s", error, extra={"action": "engine.database_away"}
                )
            now = self._clock.monotonic()
            if among is None:
                sweep_at = now + max(_SWEEP_EVERY, (now - begun) * _SHARE)
            if now < sweep_at:
                await self._until_matched_or(sweep_at - now)
            among = self._matches() if self._clock.monotonic() < sweep_at else None

    def _matches(self) -> list[UUID]:
        """Return what may match and was not looked at yet, some of it at a time."""
        matches = self._writer.matches
        found = [matches.pop() for _ in range(min(len(matches), _MOST))]
        if not matches:
            self._writer.may_match.clear()
        return found

    async def _until_matched_or(self, seconds: float) -> None:
        sleeping = asyncio.ensure_future(self._clock.sleep(seconds))
        matched = asyncio.ensure_future(self._writer.may_match.wait())
        try:
            await asyncio.wait((sleeping, matched), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            matched.cancel()

    async def take(self, most: int = _BATCH, *, among: Collection[UUID] | None = None) -> int:
        """Give parked events to the instances that wait for them by now; return how many there were, 0 for none taken.

        Of several for one part of a flow the first is taken: the others are early for whoever waits next. `among` are
        the correlations that are looked at; None for all.
        """
        try:
            return await self._take(most, among)
        except Exception as error:
            if is_cancelled() or is_transient(error) or isinstance(error, StaleRowError):
                raise
            if most == 1:
                return await self._bury(error, among)
            logger.warning("early events are taken one by one: %r", error, extra={"action": "engine.batch_split"})
        taken = 0
        while await self.take(1, among=among):
            taken += 1
        return taken

    async def _take(self, most: int, among: Collection[UUID] | None) -> int:
        async with transaction(self._engine) as connection:
            rows = await self._waiters.claim(connection, self._sagas.by_version, most, among)
            if not rows:
                return 0
            items = [(row, item) for row in rows for item in self._intake.read(EarlyDelivery(row.body))]
            facts = await self._lookups.of_messages(connection, [item for _, item in items], lock=True)
            arrivals = Arrivals(batch := self._writer.batch(facts))
            done = [row.id for row, item in items if arrivals.take_parked(row.saga, item)]
            await self._writer.settle_lines(connection, batch, grant=most > 1)
            async with together(connection):
                await self._waiters.remove(connection, done)
                after_commit = await self._writer.write(connection, batch)
        after_commit()
        return len(rows) if done else 0

    async def _bury(self, error: Exception, among: Collection[UUID] | None) -> int:
        """Give up on the first early event: what it causes cannot be stored."""
        async with transaction(self._engine) as connection:
            rows = await self._waiters.claim(connection, self._sagas.by_version, 1, among)
            batch = self._writer.batch(NOTHING)
            for item in (item for row in rows for item in self._intake.read(EarlyDelivery(row.body))):
                batch.reject(item, error)
            await self._waiters.remove(connection, [row.id for row in rows])
            after_commit = await self._writer.write(connection, batch)
        after_commit()
        return len(rows)

    async def _expire(self) -> int:
        async with transaction(self._engine) as connection:
            expired = await self._waiters.expire(connection, self._store.clock.now(), _BATCH)
        for row in expired:
            extra = {"action": "engine.parked_expired", "event": row.event, "saga": row.saga}
            logger.warning("no %s has waited in time for %s", row.saga, row.event, extra=extra)
        return len(expired)
