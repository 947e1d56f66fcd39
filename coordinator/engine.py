"""The imperative shell: takes what is waiting, decides on all of it, commits once, acknowledges."""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.batch import Batch, Ports
from coordinator.decision import Acted
from coordinator.definition import SagaDefinition
from coordinator.facts import NOTHING, Facts, Lookups
from coordinator.instance import Instance
from coordinator.items import Items
from coordinator.lines import Lines
from coordinator.replays import Replays
from coordinator.sagas import CONSUMER, Sagas, UnknownSagaError
from coordinator.store import Store
from coordinator.transfer import NotTransferableError
from coordinator.waiting import EarlyDelivery, Waiting
from events.bulk import together
from events.bus import Bus, Consumer
from events.clock import Clock
from events.codec import Limits
from events.database import is_transient, single_statements, transaction
from events.dead_letters import bury
from events.errors import CoordinatorError, StaleRowError
from events.failpoints import failpoint
from events.ids import Ids
from events.intake import Intake, Item, completed_by, settle
from events.outbox import AfterCommit, Outbox
from events.service import Supervisor, is_cancelled

logger = logging.getLogger(__name__)

_BATCH = 256
_PREFETCH = 32
_TIMER_BATCH = 200
_LINES = 100  # that are mended at a time
_MEND_EVERY = 30.0
_REPLAYS_EVERY = 1.0
_SWEEP_EVERY = 5.0  # for early events whose match was missed by a process that has died since
_TRIES = 3  # of a message whose consequences cannot be stored for a reason that is not known
_DATABASE_PAUSE = 0.5


class Engine:
    """Runs the sagas of an application in one process; any number of processes may do so side by side."""

    def __init__(
        self,
        definitions: Iterable[SagaDefinition],
        *,
        retired: Iterable[SagaDefinition] = (),
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
        self._sagas = Sagas(definitions, retired)
        self.queues = self._sagas.queues
        self._ports = Ports(source, store.clock.now, clock.now, ids)
        self._engine = engine
        self._single = single_statements(engine)
        self._store = store
        self._bus = bus
        self._outbox = outbox
        self._clock = clock
        self._ids = ids
        self._timer_every = timer_every
        self._lines = Lines(store)
        self._mend_lines = False
        self._items = Items()
        self._waiting = Waiting()
        self._lookups = Lookups(self._sagas, store, self._items, self._waiting)
        self._intake = Intake(limits)
        self._due_now = asyncio.Event()
        self._may_match = asyncio.Event()
        self._replays = Replays(engine, self._intake, self._sagas.by_version, clock=clock, ids=ids)
        self._supervisor = Supervisor(clock)
        self._consumers: list[Consumer] = []

    @property
    def definitions(self) -> list[SagaDefinition]:
        """All versions of the sagas that it runs."""
        return list(self._sagas.by_version.values())

    @property
    def failing(self) -> frozenset[str]:
        """The names of its background tasks that have failed and wait to be started again."""
        return self._supervisor.failing

    async def start(self) -> None:
        """Start to consume; the queues must have been declared."""
        await self._store.clock.calibrate()
        self._supervisor.start("coordinator.engine", self._run)
        self._supervisor.start("coordinator.timers", self._run_timers)
        self._supervisor.start("coordinator.going_on", self._run_what_is_due_now)
        self._supervisor.start("coordinator.replays", self._run_replays)
        if self._sagas.awaited:
            self._supervisor.start("coordinator.parked", self._run_parked)
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
                if hopeless and grant and self._sagas.with_lock:
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
            await self._settle_lines(connection, batch, grant=grant)
            async with together(connection):
                after_commit = await self._write(connection, batch, items)
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
                after_commit = await self._write(connection, batch, items)
                await failpoint("engine.before_commit")
        return after_commit

    async def _decide(self, connection: AsyncConnection, items: Sequence[Item], *, lock: bool) -> Batch:
        batch = self._batch(await self._lookups.of_messages(connection, items, lock=lock))
        for item in items:
            batch.take(item)
        return batch

    async def _bury(self, item: Item, error: Exception) -> None:
        """Give up on a message whose consequences cannot be stored."""
        batch = self._batch(NOTHING)
        batch.reject(item, error)
        async with transaction(self._engine) as connection:
            after_commit = await self._write(connection, batch, [item])
        after_commit()
        await settle([item])

    # Both

    def _batch(self, facts: Facts) -> Batch:
        return Batch(self._sagas, self._ports, facts)

    async def _write(self, connection: AsyncConnection, batch: Batch, items: Sequence[Item]) -> AfterCommit:
        """Write changed instances, history, dead letters and outbox: one statement each, or one for all."""
        await self._store.update(connection, batch.changed, batch.loaded)
        await self._store.record(connection, batch.history)
        await self._items.write(connection, [*batch.fresh, *batch.changed], batch.loaded)
        await self._waiting.write(
            connection,
            begun=list(batch.begun.values()),
            over=batch.over,
            parked=batch.parked,
            taken=batch.taken,
            consumer=CONSUMER,
            now=self._store.clock.now(),
        )
        if batch.letters:
            await bury(connection, batch.letters, ids=self._ids, now=self._store.clock.now())
        await self._replays.remove(connection, items)
        await self._replays.hold(connection, batch.held)
        messages = [message for _, message in batch.messages]
        hand_over = await self._outbox.write(connection, messages, completed_by(items))

        def after_commit() -> None:
            hand_over()
            batch.log()
            now = self._store.clock.now()
            if any(each.wants_more_by(now) for each in (*batch.fresh, *batch.changed)):
                self._due_now.set()
            if batch.begun or batch.parked:
                self._may_match.set()

        return after_commit

    # Lines of sagas that wait for a business key

    async def _settle_lines(
        self, connection: AsyncConnection, batch: Batch, keys: Iterable[str] = (), *, grant: bool = True
    ) -> None:
        """Start who is next, in the transaction in which the one before ends."""
        if not self._sagas.with_lock:
            return
        batch.admit(instance for instance in batch.fresh if instance.id in batch.joining)
        left = await self._lines.settle(connection, batch, keys, grant=grant)
        self._mend_lines = self._mend_lines or left

    async def mend_lines(self) -> int:
        """Start who waits although nobody holds the key any more; return how many lines were looked at."""
        keys = await self._lines.stalled(self._sagas.with_lock, _LINES)
        for key in keys:
            batch = self._batch(NOTHING)
            try:
                async with transaction(self._engine) as connection:
                    await self._lines.clear(connection, [key])
                    await self._settle_lines(connection, batch, [key])
                    async with together(connection):
                        after_commit = await self._write(connection, batch, [])
            except Exception as error:
                if is_cancelled() or is_transient(error) or not batch.changed:
                    raise
                waiting = batch.loaded[batch.changed[0].id]
                await self._give_up(waiting, f"what it begins with cannot be stored: {error!r}")
            else:
                after_commit()
        return len(keys)

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
            if len(acts) == 1 and grant and self._sagas.with_lock:
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
            batch = self._batch(Facts(await self._lookups.of(connection, acts, named, lock=not dry_run)))
            done = {saga: batch.act(saga, given) for saga, given in acts.items()}
            if dry_run:
                return done
            await self._settle_lines(connection, batch, grant=grant)
            async with together(connection):
                after_commit = await self._write(connection, batch, [])
        after_commit()
        return done

    async def transfer(self, sagas: Sequence[UUID], to: SagaDefinition, *, by: str, why: str) -> dict[UUID, str]:
        """Take instances over into another version, in one transaction; return why others stay as they are."""
        stay: dict[UUID, str] = {}
        async with transaction(self._engine) as connection:
            batch = self._batch(Facts(await self._store.load(connection, sagas)))
            for instance in batch.loaded.values():
                try:
                    batch.transfer(instance, to, by=by, why=why)
                except (NotTransferableError, UnknownSagaError) as error:
                    stay[instance.id] = str(error)
            await self._store.pin(connection, batch.changed)
            before = [batch.loaded[instance.id] for instance in batch.changed]
            await self._replays.readdress(connection, before, to.version)
            async with together(connection):
                after_commit = await self._write(connection, batch, [])
        after_commit()
        return stay

    # Deadlines

    async def _run_timers(self) -> None:
        mend_at = self._clock.monotonic()
        while True:
            try:
                await self._store.clock.calibrate_if_old()
                await self._fire_all()
                if self._sagas.with_lock and (self._mend_lines or self._clock.monotonic() >= mend_at):
                    self._mend_lines, mend_at = False, self._clock.monotonic() + _MEND_EVERY
                    while await self.mend_lines() == _LINES:
                        pass
            except Exception as error:
                if is_cancelled() or not (is_transient(error) or isinstance(error, StaleRowError)):
                    raise
                logger.warning("deadlines wait for the database: %s", error, extra={"action": "engine.database_away"})
            await self._clock.sleep(self._timer_every)

    async def _run_what_is_due_now(self) -> None:
        """Fan-outs that want their next items do not wait for the next look at the deadlines."""
        while True:
            await self._due_now.wait()
            self._due_now.clear()
            try:
                await self._fire_all()
            except Exception as error:
                if is_cancelled() or not (is_transient(error) or isinstance(error, StaleRowError)):
                    raise
                logger.warning("the next look does it: %s", error, extra={"action": "engine.database_away"})

    async def _fire_all(self) -> None:
        """Decide on all instances that are due, a batch at a time, and leave messages at least as much room.

        A hundred thousand may be due in the same second: what they cause would pile up in the outbox, and the answers
        to what was asked before would wait until all of them are through.
        """
        begun = self._clock.monotonic()
        while await self.fire_timers() == _TIMER_BATCH:
            await self._bus.until_writable()
            if (taken := self._clock.monotonic() - begun) > 0:
                await self._clock.sleep(taken)
            begun = self._clock.monotonic()

    async def fire_timers(self, most: int = _TIMER_BATCH) -> int:
        """Decide on instances whose deadline has passed, `most` of them at most; return how many there were."""
        due: dict[UUID, Instance] = {}
        try:
            async with transaction(self._engine) as connection:
                due = await self._store.claim_due(connection, self._sagas.by_version, most, items=self._sagas.have_fans)
                if not due:
                    return 0
                now = self._store.clock.now()
                batch = self._batch(Facts(await self._lookups.with_items(connection, due, due=now)))
                for instance in batch.loaded.values():
                    batch.elapse(instance)
                await failpoint("engine.timers_claimed")
                await self._settle_lines(connection, batch, grant=most > 1)
                async with together(connection):
                    after_commit = await self._write(connection, batch, [])
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
            await self._give_up(instance, f"what its deadline causes cannot be stored: {error!r}")
            return 1
        logger.warning("deadlines are decided on one by one: %r", error, extra={"action": "engine.batch_split"})
        fired = 0
        while fired < len(due) and await self.fire_timers(1):
            fired += 1
        return fired

    async def _give_up(self, instance: Instance, reason: str) -> None:
        async with transaction(self._engine) as connection:
            loaded = await self._store.load(connection, [instance.id])
            batch = self._batch(Facts(loaded))
            if loaded[instance.id].revision == instance.revision:
                batch.stop(loaded[instance.id], reason)
            after_commit = await self._write(connection, batch, [])
        after_commit()

    # Early events

    async def _run_parked(self) -> None:
        while True:
            self._may_match.clear()
            try:
                while await self.take_parked() == _BATCH:
                    pass
                await self._expire_parked()
            except Exception as error:
                if is_cancelled() or not (is_transient(error) or isinstance(error, StaleRowError)):
                    raise
                logger.warning(
                    "early events wait for the database: %s", error, extra={"action": "engine.database_away"}
                )
            await self._until_matched_or(_SWEEP_EVERY)

    async def _until_matched_or(self, seconds: float) -> None:
        sleeping = asyncio.ensure_future(self._clock.sleep(seconds))
        matched = asyncio.ensure_future(self._may_match.wait())
        try:
            await asyncio.wait((sleeping, matched), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            matched.cancel()

    async def take_parked(self, most: int = _BATCH) -> int:
        """Give parked events to the instances that wait for them by now; return how many were done with."""
        try:
            return await self._take_parked(most)
        except Exception as error:
            if is_cancelled() or is_transient(error) or isinstance(error, StaleRowError):
                raise
            if most == 1:
                return await self._bury_parked(error)
            logger.warning("early events are taken one by one: %r", error, extra={"action": "engine.batch_split"})
        taken = 0
        while await self.take_parked(1):
            taken += 1
        return taken

    async def _take_parked(self, most: int) -> int:
        async with transaction(self._engine) as connection:
            rows = await self._waiting.claim(connection, self._sagas.by_version, most)
            if not rows:
                return 0
            items = [(row, item) for row in rows for item in self._intake.read(EarlyDelivery(row.body))]
            batch = self._batch(await self._lookups.of_messages(connection, [item for _, item in items], lock=True))
            done = [row.id for row, item in items if batch.take_parked(row.saga, item)]
            async with together(connection):
                await self._waiting.remove(connection, done)
                after_commit = await self._write(connection, batch, [])
        after_commit()
        return len(done)

    async def _bury_parked(self, error: Exception) -> int:
        """Give up on the first early event: what it causes cannot be stored."""
        async with transaction(self._engine) as connection:
            rows = await self._waiting.claim(connection, self._sagas.by_version, 1)
            batch = self._batch(NOTHING)
            for item in (item for row in rows for item in self._intake.read(EarlyDelivery(row.body))):
                batch.reject(item, error)
            await self._waiting.remove(connection, [row.id for row in rows])
            after_commit = await self._write(connection, batch, [])
        after_commit()
        return len(rows)

    async def _expire_parked(self) -> None:
        async with transaction(self._engine) as connection:
            expired = await self._waiting.expire(connection, self._store.clock.now(), _BATCH)
        for row in expired:
            extra = {"action": "engine.parked_expired", "event": row.event, "saga": row.saga}
            logger.warning("no %s has waited in time for %s", row.saga, row.event, extra=extra)
