"""Reminders and escalations: what has waited for too long, found by its deadline and told to whom it may concern."""

import logging
from collections.abc import Mapping
from dataclasses import replace

from coordinator.lifecycles.entity import Entity, Moved
from coordinator.lifecycles.moves import elapse
from coordinator.lifecycles.service import Lifecycles
from events.bulk import together
from events.clock import Clock
from events.database import is_transient, transaction
from events.errors import RejectedError, StaleRowError
from events.outbox import Outbound
from events.service import Supervisor, is_cancelled

logger = logging.getLogger(__name__)

_BATCH = 200
EVERY = 1.0  # seconds between two looks


class LifecycleTimers:
    """Fires the deadlines of an application's entities; any number of processes may do so side by side.

    Args:
        lifecycles: the entities.
        clock: measures the time between two looks; whether something is due, the database's clock says.
    """

    def __init__(self, lifecycles: Lifecycles, clock: Clock) -> None:
        self._lifecycles = lifecycles
        self._clock = clock
        self._supervisor = Supervisor(clock)

    @property
    def failing(self) -> frozenset[str]:
        """The names of its background tasks that have failed and wait to be started again."""
        return self._supervisor.failing

    async def start(self) -> None:
        """Begin to look for what is due."""
        self._supervisor.start("lifecycles.timers", self._run)

    async def stop(self) -> None:
        """Look no more."""
        await self._supervisor.stop()

    async def _run(self) -> None:
        while True:
            try:
                await self._lifecycles.store.clock.calibrate_if_old()
                while await self.fire() == _BATCH:
                    pass
            except Exception as error:
                if is_cancelled() or not (is_transient(error) or isinstance(error, StaleRowError)):
                    raise
                logger.warning(
                    "reminders wait for the database: %s", error, extra={"action": "lifecycles.database_away"}
                )
            await self._clock.sleep(EVERY)

    async def fire(self) -> int:
        """Remind and escalate what is due, a batch of it at most; return how many there were."""
        store, definitions = self._lifecycles.store, self._lifecycles.definitions
        async with transaction(store.engine) as connection:
            due = await store.claim_due(connection, definitions.by_version, _BATCH)
            if not due:
                return 0
            told = [each for entity in due for each in self._elapse(entity)]
            moved = [each for each, _ in told]
            async with together(connection):
                await store.update(connection, moved)
                after_commit = await self._lifecycles.send(connection, [message for _, message in told])
        after_commit()
        for each in moved:
            self._log(each)
        return len(due)

    def _elapse(self, entity: Entity) -> list[tuple[Moved, Outbound | None]]:
        moved = elapse(self._lifecycles.definitions.of(entity), entity, self._lifecycles.store.clock.now())
        if moved is None:
            return []
        try:
            return [(moved, self._lifecycles.outbound(moved))]
        except RejectedError as error:  # it happens without its event, rather than holding up all others
            entry = replace(moved.entry, comment=f"its event could not be sent: {error}")
            return [(replace(moved, entry=entry, event=None), None)]

    def _log(self, moved: Moved) -> None:
        entity, entry = moved.entity, moved.entry
        about: Mapping[str, object] = {
            "action": f"lifecycles.{entry.kind}",
            "lifecycle": entity.lifecycle,
            "key": entity.key,
            "state": entity.state,
        }
        said = (entity.lifecycle, entity.key, entry.kind, entry.from_state)
        if entry.comment:
            logger.error("%s %s is %s in %s, but %s", *said, entry.comment, extra=about)
        else:
            logger.info("%s %s is %s in %s", *said, extra=about)
