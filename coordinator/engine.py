"""The imperative shell: takes what is waiting, decides on all of it, commits once, acknowledges."""

import logging
from collections.abc import Mapping, Sequence
from itertools import count
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.arrivals import Arrivals
from coordinator.batch import Batch, Ports
from coordinator.deadlines import Deadlines
from coordinator.decision import Acted
from coordinator.definition import SagaDefinition
from coordinator.early import EarlyEvents
from coordinator.facts import NOTHING, Facts, Lookups
from coordinator.instance import Instance
from coordinator.items import Items
from coordinator.lines import Lines
from coordinator.replays import Replays
from coordinator.sagas import Sagas, UnknownSagaError
from coordinator.store import Store
from coordinator.transfer import NotTransferableError
from coordinator.waiting import Waiters
from coordinator.writer import Writer
from events.bulk import together
from events.bus import Bus, Consumer
from events.clock import Clock
from events.codec import Limits
from events.database import is_transient, single_statements, transaction
from events.errors import CoordinatorError, StaleRowError
from events.failpoints import failpoint
from events.ids import Ids
from events.intake import Intake, Item, settle
from events.outbox import AfterCommit, Outbox
from events.service import Supervisor, is_cancelled

logger = logging.getLogger(__name__)

_BATCH = 256
_PREFETCH = 32
_REPLAYS_EVERY = 1.0
_TRIES = 3  # of a message whose consequences cannot be stored for a reason that is not known
_DATABASE_PAUSE = 0.5


class Engine:
    """Runs the sagas of an application in one process; any number of processes may do so side by side."""

    def __init__(
        self,
        sagas: Sagas,
        *,
        source: str,
        engine: AsyncEngine,
        store: Store,
        bus: Bus,
        outbox: Outbox,
        clock: Clock,
        ids: Ids,
        limits: Limits,
        timer_every: float = 0.5,
    ) -> None:
        self.sagas = sagas
        self.queues = self.sagas.queues
        self._engine = engine
        self._single = single_statements(engine)
        self._store = store
        self._bus = bus
        self._clock = clock
        self._intake = Intake(limits)
        self._replays = Replays(engine, self._intake, self.sagas.by_version, clock=clock, ids=ids)
        self._supervisor = Supervisor(clock)
        lines, items, waiters = Lines(store), Items(), Waiters()
        self._lookups = Lookups(self.sagas, store, items, waiters)
        self._writer = Writer(
            self.sagas,
            Ports(source, store.clock.now, clock.now, ids),
            engine=engine,
            store=store,
            items=items,
            waiters=waiters,
            lines=lines,
            replays=self._replays,
            outbox=outbox,
        )
        self.deadlines = Deadlines(
            self._writer,
            lookups=self._lookups,
            lines=lines,
            sagas=self.sagas,
            engine=engine,
            store=store,
            bus=bus,
            clock=clock,
            every=timer_every,
        )
        self._early = EarlyEvents(
            self._writer,
            lookups=self._lookups,
            waiters=waiters,
            sagas=self.sagas,
            engine=engine,
            store=store,
            intake=self._intake,
            clock=clock,
        )
        self._consumers: list[Consumer] = []

    @property
    def failing(self) -> frozenset[str]:
        """The names of its background tasks that have failed and wait to be started again."""
        return self._supervisor.failing

    async def start(self) -> None:
        """Start to consume; the queues must have been declared."""
        await self._store.clock.calibrate()
        self._supervisor.start("coordinator.engine", self._run)
        self._supervisor.start("coordinator.timers", self.deadlines.run)
        self._supervisor.start("coordinator.going_on", self.deadlines.run_what_goes_on)
        self._supervisor.start("coordinator.replays", self._run_replays)
        if self.sagas.awaited:
            self._supervisor.start("coordinator.parked", self._early.run)
        for queue in self.queues:
            self._consumers.append(await self._bus.consume(queue.name, self._intake.deliver, prefetch=_PREFETCH))

    async def stop(self) -> None:
        """Take no more; what is not committed goes back to its queue when the bus is closed."""
        for consumer in self._consumers:
            await consumer.cancel()
        self._consumers.clear()
        await self._supervisor.stop()

    # Messages

    async def _run_replays(self) -> None:
        while True:
            try:
                await self._replays.take()
            except Exception as error:
                if is_cancelled() or not is_transient(error):
                    raise
                logger.warning("replays wait for the database: %s", error, extra={"action": "engine.database_away"})
            await self._clock.sleep(_REPLAYS_EVERY)

    async def _run(self) -> None:
        while True:
            await self._bus.until_writable()  # what they cause would only pile up in the outbox
            items = await self._intake.take(_BATCH)
            try:
                await failpoint("engine.received")
                await self._process(items)
            except BaseException:
                self._intake.put_back(items)
                raise

    async def _process(self, items: list[Item]) -> None:
        """Commit what follows from `items`. A batch that keeps failing is split until the culprit is alone."""
        grant = True
        for tries in count(1):
            try:
                after_commit = await self._apply(items, grant=grant)
            except Exception as error:  # whatever it is, it must not stop the others
                if is_cancelled():
                    raise  # a driver's clean-up has turned our cancel into an error of its own
                if is_transient(error) or isinstance(error, StaleRowError):
                    logger.warning("a batch is tried again: %s", error, extra={"action": "engine.batch_retried"})
                    await self._clock.sleep(_DATABASE_PAUSE)
                    continue
                hopeless = len(items) == 1 and (tries >= _TRIES or isinstance(error, CoordinatorError))
                if hopeless and grant and self.sagas.with_lock:
                    grant = False  # it may be the saga next in line whose begin cannot be stored
                    continue
                if hopeless:
                    await self._bury(items[0], error)
                    return
                if len(items) == 1:  # nobody knows what it was: a reply is not given up on so soon
                    logger.warning("a message is tried again: %r", error, extra={"action": "engine.message_retried"})
                    await self._clock.sleep(_DATABASE_PAUSE)
                    continue
                logger.warning("a batch is split: %r", error, extra={"action": "engine.batch_split"})
                for item in items:
                    await self._process([item])
                return
            await failpoint("engine.after_commit")
            after_commit()
            await settle(items)
            await failpoint("engine.after_ack")
            return

    async def _apply(self, items: Sequence[Item], *, grant: bool) -> AfterCommit:
        if self._engine.dialect.name == "postgresql":
            try:
                if (applied := await self._apply_in_one_statement(items)) is not None:
                    return applied
            except (StaleRowError, IntegrityError) as error:  # another process was faster, or a start comes again
                logger.debug("a batch is decided on under locks: %s", error, extra={"action": "engine.batch_locked"})
        async with transaction(self._engine) as connection:
            batch = await self._decide(connection, items, lock=True)
            fresh = await self._store.insert_new(connection, list(batch.new.values()))
            batch.drop([instance.id for instance in batch.new.values() if instance.id not in fresh])
            await self._writer.settle_lines(connection, batch, grant=grant)
            async with together(connection):
                after_commit = await self._writer.write(connection, batch, items)
                await failpoint("engine.before_commit")
        return after_commit

    async def _apply_in_one_statement(self, items: Sequence[Item]) -> AfterCommit | None:
        """Read without locks, and write in one statement that fails if anything has changed since: two round trips.

        Return None, and write nothing, if a line for a business key changes: that needs to be locked before.
        """
        async with self._single.connect() as connection:
            batch = await self._decide(connection, items, lock=False)
            if batch.joining or batch.leaving:
                return None
            async with together(connection):
                await self._store.insert(connection, list(batch.new.values()))
                after_commit = await self._writer.write(connection, batch, items)
                await failpoint("engine.before_commit")
        return after_commit

    async def _decide(self, connection: AsyncConnection, items: Sequence[Item], *, lock: bool) -> Batch:
        batch = self._writer.batch(await self._lookups.of_messages(connection, items, lock=lock))
        arrivals = Arrivals(batch)
        for item in items:
            arrivals.take(item)
        return batch

    async def _bury(self, item: Item, error: Exception) -> None:
        """Give up on a message whose consequences cannot be stored."""
        batch = self._writer.batch(NOTHING)
        batch.reject(item, error)
        async with transaction(self._engine) as connection:
            after_commit = await self._writer.write(connection, batch, [item])
        after_commit()
        await settle([item])

    # Operators

    async def act(self, saga: UUID, given: Acted) -> Instance:
        """Do what an operator asks for, and return the instance as it is then.

        Raises:
            UnknownSagaError: this application does not have its definition.
            NotPossibleError: it makes no sense where the saga stands.
        """
        [done] = (await self.act_on_all({saga: given})).values()
        if isinstance(done, CoordinatorError):
            raise done
        return done

    async def act_on_all(
        self, acts: Mapping[UUID, Acted], *, dry_run: bool = False, grant: bool = True
    ) -> dict[UUID, Instance | CoordinatorError]:
        """Do what an operator asks for, in one transaction, and return each instance as it is then, or why not.

        What is refused for one saga changes nothing for the others; with `dry_run` nothing is changed at all.
        Without `grant`, a saga that waits for the key of one that ends is started a moment later.
        """
        try:
            return await self._act_together(acts, dry_run=dry_run, grant=grant)
        except Exception as error:
            if is_cancelled() or is_transient(error) or isinstance(error, StaleRowError):
                raise
            if len(acts) == 1 and grant and self.sagas.with_lock:
                return await self.act_on_all(acts, dry_run=dry_run, grant=False)
            if len(acts) == 1 and isinstance(error, CoordinatorError):
                return dict.fromkeys(acts, error)
            if len(acts) == 1:
                raise
        # What follows for one of them cannot be stored.
        done = [await self.act_on_all({saga: given}) for saga, given in acts.items()]
        return {saga: each for one in done for saga, each in one.items()}

    async def _act_together(
        self, acts: Mapping[UUID, Acted], *, dry_run: bool, grant: bool
    ) -> dict[UUID, Instance | CoordinatorError]:
        async with transaction(self._engine) as connection:
            named = [(saga, given.step) for saga, given in acts.items() if given.step]
            batch = self._writer.batch(Facts(await self._lookups.of(connection, acts, named, lock=not dry_run)))
            done = {saga: batch.act(saga, given) for saga, given in acts.items()}
            if dry_run:
                return done
            await self._writer.settle_lines(connection, batch, grant=grant)
            async with together(connection):
                after_commit = await self._writer.write(connection, batch)
        after_commit()
        return done

    async def transfer(self, sagas: Sequence[UUID], to: SagaDefinition, *, by: str, why: str) -> dict[UUID, str]:
        """Take instances over into another version, in one transaction; return why others stay as they are."""
        stay: dict[UUID, str] = {}
        async with transaction(self._engine) as connection:
            batch = self._writer.batch(Facts(await self._store.load(connection, sagas)))
            for instance in batch.loaded.values():
                try:
                    batch.transfer(instance, to, by=by, why=why)
                except (NotTransferableError, UnknownSagaError) as error:
                    stay[instance.id] = str(error)
            await self._store.pin(connection, batch.changed)
            before = [batch.loaded[instance.id] for instance in batch.changed]
            await self._replays.readdress(connection, before, to.version)
            async with together(connection):
                after_commit = await self._writer.write(connection, batch)
        after_commit()
        return stay
