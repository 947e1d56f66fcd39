"""Looks for deadlines that have passed, and for sagas whose turn it is although nobody has told them."""

import logging
from collections.abc import Mapping
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from coordinator.facts import NOTHING, Facts, Lookups
from coordinator.instance import Instance
from coordinator.lines import Lines
from coordinator.sagas import Sagas
from coordinator.store import Store
from coordinator.writer import Writer
from events.bulk import together
from events.bus import Bus
from events.clock import Clock
from events.database import is_transient, transaction
from events.errors import StaleRowError
from events.failpoints import failpoint
from events.service import is_cancelled

logger = logging.getLogger(__name__)

_BATCH = 200
_LINES = 100  # that are mended at a time
_MEND_EVERY = 30.0


class Deadlines:
    """Fires what is due, by the database's clock.

    Args:
        writer, lookups, lines, store, engine: the database and what is written there.
        sagas: the definitions.
        bus: is given time to send what is due, before more is.
        clock: the time here, for pauses.
        every: seconds between two looks.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        lookups: Lookups,
        lines: Lines,
        sagas: Sagas,
        engine: AsyncEngine,
        store: Store,
        bus: Bus,
        clock: Clock,
        every: float,
    ) -> None:
        self._writer = writer
        self._lookups = lookups
        self._lines = lines
        self._sagas = sagas
        self._engine = engine
        self._store = store
        self._bus = bus
        self._clock = clock
        self._every = every

    async def run(self) -> None:
        """Look again and again, for ever."""
        mend_at = self._clock.monotonic()
        while True:
            try:
                await self._store.clock.calibrate_if_old()
                await self.fire_all()
                if self._sagas.with_lock and (self._writer.line_left or self._clock.monotonic() >= mend_at):
                    self._writer.line_left, mend_at = False, self._clock.monotonic() + _MEND_EVERY
                    while await self.mend_lines() == _LINES:
                        pass
            except Exception as error:
                if is_cancelled() or not (is_transient(error) or isinstance(error, StaleRowError)):
                    raise
                logger.warning("deadlines wait for the database: %s", error, extra={"action": "engine.database_away"})
            await self._clock.sleep(self._every)

    async def run_what_goes_on(self) -> None:
        """Fan-outs that want their next items do not wait for the next look at the deadlines."""
        while True:
            await self._writer.goes_on.wait()
            self._writer.goes_on.clear()
            try:
                await self.fire_all()
            except Exception as error:
                if is_cancelled() or not (is_transient(error) or isinstance(error, StaleRowError)):
                    raise
                logger.warning("the next look does it: %s", error, extra={"action": "engine.database_away"})

    async def fire_all(self) -> None:
        """Decide on all instances that are due, a batch at a time, and leave messages at least as much room.

        A hundred thousand may be due in the same second: what they cause would pile up in the outbox, and the answers
        to what was asked before would wait until all of them are through.
        """
        begun = self._clock.monotonic()
        while await self.fire() == _BATCH:
            await self._bus.until_writable()
            if (taken := self._clock.monotonic() - begun) > 0:
                await self._clock.sleep(taken)
            begun = self._clock.monotonic()

    async def fire(self, most: int = _BATCH) -> int:
        """Decide on instances whose deadline has passed, `most` of them at most; return how many there were."""
        due: dict[UUID, Instance] = {}
        try:
            async with transaction(self._engine) as connection:
                now = self._store.clock.now()
                known, have_fans = self._sagas.by_version, self._sagas.have_fans
                due = await self._store.claim_due(connection, known, most, now=now, items=have_fans)
                if not due:
                    return 0
                batch = self._writer.batch(Facts(await self._lookups.with_items(connection, due, due=now)))
                for instance in batch.loaded.values():
                    batch.elapse(instance, now)
                await failpoint("engine.timers_claimed")
                await self._writer.settle_lines(connection, batch, grant=most > 1)
                async with together(connection):
                    after_commit = await self._writer.write(connection, batch)
        except Exception as error:
            if not due or is_transient(error) or isinstance(error, StaleRowError):
                raise
            return await self._fire_one_by_one(due, error)
        await failpoint("engine.timers_committed")
        after_commit()
        return len(due)

    async def _fire_one_by_one(self, due: Mapping[UUID, Instance], error: Exception) -> int:
        """One of the instances spoils the batch: give up on it, and on no other."""
        if len(due) == 1:
            [instance] = due.values()
            await self._writer.give_up(instance, f"what its deadline causes cannot be stored: {error!r}")
            return 1
        logger.warning("deadlines are decided on one by one: %r", error, extra={"action": "engine.batch_split"})
        fired = 0
        while fired < len(due) and await self.fire(1):
            fired += 1
        return fired

    async def mend_lines(self) -> int:
        """Start who waits although nobody holds the key any more; return how many lines were looked at."""
        keys = await self._lines.stalled(self._sagas.with_lock, _LINES)
        for key in keys:
            batch = self._writer.batch(NOTHING)
            try:
                async with transaction(self._engine) as connection:
                    await self._lines.clear(connection, [key])
                    await self._writer.settle_lines(connection, batch, [key])
                    async with together(connection):
                        after_commit = await self._writer.write(connection, batch)
            except Exception as error:
                if is_cancelled() or is_transient(error) or not batch.changed:
                    raise
                waiting = batch.loaded[batch.changed[0].id]
                await self._writer.give_up(waiting, f"what it begins with cannot be stored: {error!r}")
            else:
                after_commit()
        return len(keys)
