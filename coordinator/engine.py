"""The imperative shell: takes what is waiting, decides on all of it, commits once, acknowledges."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from opentelemetry.trace import SpanKind
from pydantic_core import from_json
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.decide import (
    Announcement,
    Decision,
    Elapsed,
    Input,
    Replied,
    Request,
    Started,
    decide,
    describe,
    give_up,
)
from coordinator.definition import SagaDefinition
from coordinator.instance import Instance, Status
from coordinator.store import HistoryRow, Store
from events import tracing
from events.bulk import together
from events.bus import Address, Bus, Consumer, Exchange, Queue
from events.clock import Clock
from events.codec import Limits, Readable
from events.database import is_transient, single_statements, transaction
from events.dead_letters import DeadLetter, bury
from events.envelope import Direction, Envelope, Result, SagaLink, wrap
from events.errors import CoordinatorError, InvalidMessageError, RejectedError, StaleRowError
from events.failpoints import failpoint
from events.ids import Ids
from events.intake import Intake, Item, completed_by, settle
from events.message import Event, Failed, Message, Refused
from events.outbox import AfterCommit, Outbound, Outbox, route
from events.registry import Registry
from events.service import Supervisor

logger = logging.getLogger(__name__)

REPLY_ADDRESS = "coordinator"
_REPLY_QUEUE = "coordinator.replies"
_EVENT_QUEUE = "coordinator.events"
_CONSUMER = "coordinator"
_BATCH = 256
_PREFETCH = 32
_TIMER_BATCH = 200
_DATABASE_PAUSE = 0.5


class UnknownSagaError(RejectedError):
    """No saga instance or definition here has this name; deploy its code or restore its row, then replay."""

    code = "unknown_saga"


@dataclass(slots=True)
class _Work:
    """What a batch amounts to, built up in memory and written at the end."""

    loaded: dict[UUID, Instance] = field(default_factory=dict)
    current: dict[UUID, Instance] = field(default_factory=dict)
    new: dict[tuple[str, str], Instance] = field(default_factory=dict)
    history: list[HistoryRow] = field(default_factory=list)
    messages: list[tuple[UUID, Outbound]] = field(default_factory=list)
    letters: list[DeadLetter] = field(default_factory=list)


class Engine:
    """Runs the sagas of an application in one process; any number of processes may do so side by side."""

    def __init__(
        self,
        definitions: Iterable[SagaDefinition],
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
        self._definitions = {(each.name, each.version): each for each in definitions}
        self.queues = coordinator_queues(self._definitions.values())
        self._starts: dict[str, list[SagaDefinition]] = {}
        self._registry = Registry([Failed, Refused])
        for definition in _newest(self._definitions.values()):
            for start in definition.starts:
                self._starts.setdefault(start.event.message_type, []).append(definition)
                self._registry.add(start.event)
        for definition in self._definitions.values():
            for step in definition.steps:
                for hook in (step.on_succeeded, step.on_declined):
                    if hook is not None:
                        self._registry.add(hook.outcome)
        self._source = source
        self._engine = engine
        self._single = single_statements(engine)
        self._store = store
        self._bus = bus
        self._outbox = outbox
        self._clock = clock
        self._ids = ids
        self._limits = limits
        self._timer_every = timer_every
        self._intake = Intake(limits)
        self._supervisor = Supervisor(clock)
        self._consumers: list[Consumer] = []

    async def start(self) -> None:
        """Start to consume; the queues must have been declared."""
        await self._store.clock.calibrate()
        self._supervisor.start("coordinator.engine", self._run)
        self._supervisor.start("coordinator.timers", self._run_timers)
        for queue in self.queues:
            self._consumers.append(await self._bus.consume(queue.name, self._intake.deliver, prefetch=_PREFETCH))

    async def stop(self) -> None:
        """Take no more; a batch that is not committed goes back to its queues."""
        for consumer in self._consumers:
            await consumer.cancel()
        self._consumers.clear()
        await self._supervisor.stop()

    async def _run(self) -> None:
        while True:
            items = await self._intake.take(_BATCH)
            try:
                await self._process(items)
            except BaseException:
                self._intake.put_back(items)
                raise

    async def _process(self, items: list[Item]) -> None:
        """Commit what follows from `items`. A batch that keeps failing is split until the culprit is alone."""
        while True:
            try:
                after_commit = await self._apply(items)
            except Exception as error:  # noqa: BLE001  # whatever it is, it must not stop the others
                if is_transient(error) or isinstance(error, StaleRowError):
                    logger.warning("a batch is tried again: %s", error, extra={"action": "engine.batch_retried"})
                    await self._clock.sleep(_DATABASE_PAUSE)
                    continue
                if len(items) == 1:
                    await self._bury(items[0], error)
                    return
                logger.warning("a batch is split: %r", error, extra={"action": "engine.batch_split"})
                for item in items:
                    await self._process([item])
                return
            await failpoint("engine.after_commit")
            after_commit()
            await settle(items)
            return

    async def _apply(self, items: Sequence[Item]) -> AfterCommit:
        if self._engine.dialect.name == "postgresql":
            try:
                return await self._apply_in_one_statement(items)
            except (StaleRowError, IntegrityError) as error:  # another process was faster, or a start comes again
                logger.debug("a batch is decided on under locks: %s", error, extra={"action": "engine.batch_locked"})
        async with transaction(self._engine) as connection:
            work = await self._decide_on(connection, items, lock=True)
            after_commit = await self._write(connection, work, items)
            await failpoint("engine.before_commit")
        return after_commit

    async def _apply_in_one_statement(self, items: Sequence[Item]) -> AfterCommit:
        """Read without locks, and write in one statement that fails if anything has changed since: two round trips."""
        async with self._single.connect() as connection:
            work = await self._decide_on(connection, items, lock=False)
            async with together(connection):
                await self._store.insert(connection, list(work.new.values()))
                after_commit = await self._write_consequences(connection, work, items, work.history, work.messages)
                await failpoint("engine.before_commit")
        return after_commit

    # Deciding

    async def _decide_on(self, connection: AsyncConnection, items: Sequence[Item], *, lock: bool) -> _Work:
        work = _Work()
        ids = {
            item.part.envelope.saga.saga_id
            for item in items
            if isinstance(item.part, Readable) and item.part.envelope.saga is not None
        }
        if ids:
            work.loaded = await self._store.load(connection, list(ids), lock=lock)
            work.current = dict(work.loaded)
        for item in items:
            self._take(work, item)
        return work

    def _take(self, work: _Work, item: Item) -> None:
        """Decide on one message; whatever is wrong with it ends as a dead letter and spoils nothing else."""
        part = item.part
        try:
            if not isinstance(part, Readable):
                raise part.error  # noqa: TRY301  # one way to end up as a dead letter
            if part.envelope.saga is not None:
                self._take_reply(work, item, part.envelope)
            else:
                self._take_event(work, item, part.envelope)
        except Exception as error:  # noqa: BLE001  # user code of a start method raises what it likes
            work.letters.append(self._letter(item, error))

    def _take_event(self, work: _Work, item: Item, envelope: Envelope) -> None:
        event = self._registry.read(envelope)
        definitions = self._starts.get(envelope.type)
        if definitions is None or not isinstance(event, Event):
            raise UnknownSagaError(f"no saga here starts on {envelope.type}")
        parent, links = tracing.parent_and_links(envelope.traceparent, envelope.tracestate, item.transport)
        for definition in definitions:
            with tracing.span(f"saga {definition.name}", parent=parent, kind=SpanKind.CONSUMER, links=links) as span:
                traceparent = tracing.traceparent_of(span)
                now = self._store.clock.now()
                given = Started(self._ids.new(), event, envelope.id, now, traceparent)
                decision = decide(definition, None, given)
                if decision is None:
                    continue
                instance = decision.instance
                span.set_attributes({"saga.id": str(instance.id), "saga.key": instance.key, "saga.name": instance.saga})
                if work.new.setdefault((instance.saga, instance.key), instance) is not instance:
                    self._log_duplicate(instance)
                    continue
                work.history.append((instance.id, instance.revision, decision.entry))
                self._collect(work, decision, envelope.id, traceparent)

    def _take_reply(self, work: _Work, item: Item, envelope: Envelope) -> None:
        saga = envelope.saga
        if saga is None or saga.result is None:
            raise InvalidMessageError("a reply must carry a result")
        instance = work.current.get(saga.saga_id)
        if instance is None:
            raise UnknownSagaError(f"there is no saga instance {saga.saga_id}")
        definition = self._definition_of(instance)
        outcome = self._outcome(definition, saga, envelope)
        given = Replied(
            saga.step,
            saga.direction,
            saga.attempt,
            saga.result,
            outcome,
            _detail(outcome, envelope) if saga.result is not Result.SUCCEEDED else "",
            envelope.id,
            self._store.clock.now(),
        )
        links = [link for link in (envelope.traceparent, item.transport) if link]
        self._decide(work, definition, instance, given, f"{saga.step} {saga.direction} {saga.result}", links)

    def _definition_of(self, instance: Instance) -> SagaDefinition:
        definition = self._definitions.get((instance.saga, instance.version))
        if definition is None:
            raise UnknownSagaError(
                f"the saga {instance.saga} version {instance.version} is not part of this application"
            )
        return definition

    def _outcome(self, definition: SagaDefinition, saga: SagaLink, envelope: Envelope) -> Message | None:
        """Return the outcome's message where somebody is going to look at it."""
        step = definition.by_name.get(saga.step)
        if step is None:
            return None
        hook = step.on_succeeded if saga.result is Result.SUCCEEDED else step.on_declined
        if saga.result is Result.FAILED or hook is None or saga.direction is Direction.UNDO:
            try:
                return self._registry.read(envelope)
            except RejectedError:
                return None  # nobody asked for it; the result alone counts
        outcome = self._registry.read(envelope)
        if not isinstance(outcome, hook.outcome):
            raise InvalidMessageError(f"{hook.name} takes {hook.outcome.message_type}, the reply is {envelope.type}")
        return outcome

    def _decide(
        self,
        work: _Work,
        definition: SagaDefinition,
        instance: Instance,
        given: Input,
        name: str,
        links: Sequence[str] = (),
    ) -> None:
        parent = tracing.context_of(instance.traceparent)
        with tracing.span(f"saga {instance.saga}: {name}", parent=parent, links=links) as span:
            span.set_attribute("saga.id", str(instance.id))
            decision = decide(definition, instance, given)
            if decision is None:
                return
            work.current[instance.id] = decision.instance
            work.history.append((instance.id, decision.instance.revision, decision.entry))
            cause = given.message_id if isinstance(given, Replied) else None
            self._collect(work, decision, cause, tracing.traceparent_of(span))
            if decision.instance.status is Status.NEEDS_ATTENTION:
                tracing.mark_failed(span, decision.instance.reason or "")
                if instance.status is not Status.NEEDS_ATTENTION:
                    self._alert(decision.instance)

    def _collect(self, work: _Work, decision: Decision, cause: str | None, traceparent: str | None) -> None:
        instance = decision.instance
        for request in decision.requests:
            work.messages.append((instance.id, self._command(instance, request, cause, traceparent)))
        for announcement in decision.announcements:
            work.messages.append((instance.id, self._event(instance, announcement, cause, traceparent)))

    def _command(self, instance: Instance, request: Request, cause: str | None, traceparent: str | None) -> Outbound:
        envelope = wrap(
            request.command,
            id=str(request.id),
            source=self._source,
            time=self._clock.now(),
            correlation_id=str(instance.id),
            causation_id=cause,
            traceparent=traceparent,
            saga=SagaLink(instance.id, request.step, request.direction, request.attempt),
            reply_to=REPLY_ADDRESS,
        )
        return Outbound(envelope, route(request.command), request.command.bundle_limit)

    def _event(
        self, instance: Instance, announcement: Announcement, cause: str | None, traceparent: str | None
    ) -> Outbound:
        envelope = wrap(
            announcement.event,
            id=str(announcement.id),
            source=self._source,
            time=self._clock.now(),
            correlation_id=str(instance.id),
            causation_id=cause,
            traceparent=traceparent,
        )
        return Outbound(envelope, route(announcement.event), announcement.event.bundle_limit)

    # Writing

    async def _write(self, connection: AsyncConnection, work: _Work, items: Sequence[Item]) -> AfterCommit:
        """Write instances, history, dead letters and outbox, without those that another process has started."""
        fresh = await self._store.insert_new(connection, list(work.new.values()))
        duplicates = {instance.id for instance in work.new.values()} - fresh
        for instance in work.new.values():
            if instance.id in duplicates:
                self._log_duplicate(instance)
        history = [row for row in work.history if row[0] not in duplicates]
        messages = [message for message in work.messages if message[0] not in duplicates]
        async with together(connection):
            return await self._write_consequences(connection, work, items, history, messages)

    async def _write_consequences(
        self,
        connection: AsyncConnection,
        work: _Work,
        items: Sequence[Item],
        history: Sequence[HistoryRow],
        messages: Sequence[tuple[UUID, Outbound]],
    ) -> AfterCommit:
        changed = [instance for identity, instance in work.current.items() if instance is not work.loaded[identity]]
        await self._store.update(connection, changed, work.loaded)
        await self._store.record(connection, history)
        if work.letters:
            await bury(connection, work.letters, ids=self._ids, now=self._store.clock.now())
        return await self._outbox.write(connection, [message for _, message in messages], completed_by(items))

    async def _bury(self, item: Item, error: Exception) -> None:
        """Give up on a message whose consequences cannot be stored."""
        work = _Work(letters=[self._letter(item, error)])
        async with transaction(self._engine) as connection:
            after_commit = await self._write(connection, work, [item])
        after_commit()
        await settle([item])

    def _letter(self, item: Item, error: Exception) -> DeadLetter:
        reason = error.code if isinstance(error, CoordinatorError) else "failed"
        logger.warning(
            "the coordinator cannot take a message: %s: %s",
            reason,
            error,
            exc_info=None if isinstance(error, RejectedError) else error,
            extra={"action": "engine.rejected", "reason": reason},
        )
        return DeadLetter(item, _CONSUMER, reason, str(error) if isinstance(error, CoordinatorError) else repr(error))

    # Deadlines

    async def _run_timers(self) -> None:
        while True:
            try:
                await self._store.clock.calibrate_if_old()
                while await self.fire_timers() == _TIMER_BATCH:
                    pass
            except Exception as error:
                if not (is_transient(error) or isinstance(error, StaleRowError)):
                    raise
                logger.warning("deadlines wait for the database: %s", error, extra={"action": "engine.database_away"})
            await self._clock.sleep(self._timer_every)

    async def fire_timers(self) -> int:
        """Decide on instances whose deadline has passed; return how many there were."""
        async with transaction(self._engine) as connection:
            due = await self._store.claim_due(connection, self._definitions, _TIMER_BATCH)
            if not due:
                return 0
            work = _Work(loaded=due, current=dict(due))
            now = self._store.clock.now()
            for instance in due.values():
                self._elapse(work, instance, now)
            await failpoint("engine.timers_claimed")
            after_commit = await self._write(connection, work, [])
        after_commit()
        return len(due)

    def _elapse(self, work: _Work, instance: Instance, now: datetime) -> None:
        definition = self._definition_of(instance)
        # The database found the deadline passed; our copy of its clock may be a moment behind.
        given = Elapsed(max(now, instance.due_at or now))
        try:
            self._decide(work, definition, instance, given, "deadline")
        except Exception as error:
            logger.exception("saga %s cannot be read", instance.id, extra={"action": "saga.unreadable"})
            decision = give_up(instance, f"{definition.cls.__name__} cannot read its state: {error!r}", now)
            work.current[instance.id] = decision.instance
            work.history.append((instance.id, decision.instance.revision, decision.entry))
            self._alert(decision.instance)

    def _log_duplicate(self, instance: Instance) -> None:
        logger.info(
            "%s %s was started before; this start is a duplicate",
            instance.saga,
            instance.key,
            extra={"action": "saga.duplicate_start", "saga": instance.saga, "key": instance.key},
        )

    def _alert(self, instance: Instance) -> None:
        logger.error(
            "saga %s %s needs attention: %s",
            instance.saga,
            instance.id,
            instance.reason,
            extra={"action": "saga.needs_attention", "saga": instance.saga, "saga_id": str(instance.id)},
        )


def _detail(outcome: Message | None, envelope: Envelope) -> str:
    """Return why a step did not succeed, in words; also where the saga does not know the outcome's class."""
    if outcome is not None:
        return describe(outcome)
    reason = from_json(envelope.data).get("reason")
    return str(reason) if reason is not None else envelope.type


def coordinator_queues(definitions: Iterable[SagaDefinition]) -> list[Queue]:
    """Return the queues that a coordinator of these sagas consumes: start events, and replies."""
    types = {start.event.message_type for definition in _newest(definitions) for start in definition.starts}
    starts = tuple(Address(Exchange.EVENTS, message_type) for message_type in sorted(types))
    return [Queue(_EVENT_QUEUE, starts), Queue(_REPLY_QUEUE, (Address(Exchange.REPLIES, REPLY_ADDRESS),))]


def _newest(definitions: Iterable[SagaDefinition]) -> list[SagaDefinition]:
    newest: dict[str, SagaDefinition] = {}
    for definition in definitions:
        known = newest.get(definition.name)
        if known is None or known.version < definition.version:
            newest[definition.name] = definition
    return list(newest.values())
