"""What a batch of messages and deadlines amounts to: decided on in memory, for the engine to write."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from opentelemetry.trace import SpanKind
from pydantic_core import from_json, to_json

from coordinator.acts import NotPossibleError
from coordinator.chain import HistoryRow, history_row
from coordinator.decide import decide, describe, give_up
from coordinator.decision import Acted, Announcement, Decision, Elapsed, Input, Replied, Request, Started
from coordinator.definition import SagaDefinition
from coordinator.instance import Instance, Status, StepStatus
from events import tracing
from events.codec import Readable
from events.dead_letters import DeadLetter
from events.derive import derive_id
from events.envelope import Direction, Envelope, Result, SagaLink, wrap
from events.errors import CoordinatorError, InvalidMessageError, RejectedError
from events.ids import Ids
from events.intake import Item
from events.message import Event, Failed, Message, Refused
from events.outbox import Outbound, route
from events.registry import Registry
from handlers.retries import Waiting, row_of

logger = logging.getLogger(__name__)

REPLY_ADDRESS = "coordinator"
CONSUMER = "coordinator"

SagaKey = tuple[str, int]  # a saga's name and version
Note = Callable[[], None]


class UnknownSagaError(RejectedError):
    """No saga instance or definition here has this name; deploy its code or restore its row, then replay."""

    code = "unknown_saga"


class Sagas:
    """The saga definitions of an application, as its coordinator looks them up; `retired` ones start nothing."""

    def __init__(self, definitions: Iterable[SagaDefinition], retired: Iterable[SagaDefinition] = ()) -> None:
        starting = list(definitions)
        self.by_version = {(each.name, each.version): each for each in (*starting, *retired)}
        self.missing: set[SagaKey] = set()  # what replies have come for in vain
        self.starts: dict[str, list[SagaDefinition]] = {}
        self.registry = Registry([Failed, Refused])
        for definition in _newest(starting):
            for start in definition.starts:
                self.starts.setdefault(start.event.message_type, []).append(definition)
                self.registry.add(start.event)
        for definition in self.by_version.values():
            for step in definition.steps:
                for hook in (step.on_succeeded, step.on_declined):
                    if hook is not None:
                        self.registry.add(hook.outcome)

    def of(self, instance: Instance) -> SagaDefinition:
        """Return the definition that `instance` was started with.

        Raises:
            UnknownSagaError: it is not part of this application.
        """
        definition = self.by_version.get((instance.saga, instance.version))
        if definition is None:
            raise UnknownSagaError(
                f"the saga {instance.saga} version {instance.version} is not part of this application"
            )
        return definition


def _newest(definitions: Iterable[SagaDefinition]) -> list[SagaDefinition]:
    newest: dict[str, SagaDefinition] = {}
    for definition in definitions:
        known = newest.get(definition.name)
        if known is None or known.version < definition.version:
            newest[definition.name] = definition
    return list(newest.values())


@dataclass(frozen=True, slots=True)
class Ports:
    """What a batch takes from outside.

    Attributes:
        source: the CloudEvents source of what the coordinator says.
        now: the database's time, which deadlines count on.
        time: the local time of day, for envelopes.
        ids: ids of new instances.
    """

    source: str
    now: Callable[[], datetime]
    time: Callable[[], datetime]
    ids: Ids


class Batch:
    """Messages and deadlines decided on together.

    Attributes:
        current: instances by id, as they are after what was decided; at first as they were `loaded`.
        new: instances that start events of the batch have made, by saga and key.
        history: the transitions.
        messages: what to send, each with the id of the instance that sends it.
        letters: messages that cannot be taken.
        held: replies to instances of versions that this application does not have, for processes that have them.
    """

    def __init__(self, sagas: Sagas, ports: Ports, loaded: Mapping[UUID, Instance]) -> None:
        self._sagas = sagas
        self._ports = ports
        self.loaded = loaded
        self.current = dict(loaded)
        self.new: dict[tuple[str, str], Instance] = {}
        self.history: list[HistoryRow] = []
        self.messages: list[tuple[UUID, Outbound]] = []
        self.letters: list[DeadLetter] = []
        self.held: list[Waiting] = []
        self._notes: list[Note] = []

    @property
    def changed(self) -> list[Instance]:
        """The loaded instances of which something was decided."""
        return [instance for identity, instance in self.current.items() if instance is not self.loaded[identity]]

    def take(self, item: Item) -> None:
        """Decide on one message; whatever is wrong with it ends as a dead letter and spoils nothing else."""
        part = item.part
        try:
            if not isinstance(part, Readable):
                raise part.error  # noqa: TRY301  # one way to end up as a dead letter
            if part.envelope.saga is not None:
                self._take_reply(item, part, part.envelope.saga)
            else:
                self._take_event(item, part.envelope)
        except Exception as error:  # noqa: BLE001  # user code of a start method raises what it likes
            self.reject(item, error)

    def elapse(self, instance: Instance) -> None:
        """Decide on an instance whose deadline has passed."""
        now = self._ports.now()
        # The database found the deadline passed; our copy of its clock may be a moment behind.
        given = Elapsed(max(now, instance.due_at or now))
        definition = self._sagas.of(instance)
        try:
            self._decide(definition, instance, given, "deadline", cause=_unanswered(instance, given.now))
        except Exception as error:
            logger.exception("saga %s cannot be decided on", instance.id, extra={"action": "saga.undecidable"})
            self.stop(instance, f"{definition.cls.__name__} cannot be decided on: {error!r}")

    def act(self, saga: UUID, given: Acted) -> Instance | CoordinatorError:
        """Decide on what an operator does to a loaded instance; return the instance, or why it is refused."""
        try:
            instance = self.loaded.get(saga)
            if instance is None:
                raise UnknownSagaError(f"there is no saga instance {saga} any more")  # noqa: TRY301  # one way out
            definition, recorded = self._sagas.of(instance), _said(given)
            self._decide(definition, instance, given, given.verb.value, cause=None, recorded=recorded)
        except CoordinatorError as error:
            return error
        except Exception as error:  # noqa: BLE001  # a state that its class cannot read, say
            return NotPossibleError(f"the saga cannot be decided on: {error!r}")
        return self.current[saga]

    def stop(self, instance: Instance, reason: str) -> None:
        """Leave an instance to a person: nothing that it wants to do can be done."""
        decision = give_up(instance, reason, self._ports.now())
        self.current[instance.id] = self._record(decision, None)
        self._notes.append(lambda: _alert(decision.instance))

    def reject(self, item: Item, error: Exception) -> None:
        """Keep a message that cannot be taken, with the reason."""
        reason = error.code if isinstance(error, CoordinatorError) else "failed"
        detail = str(error) if isinstance(error, CoordinatorError) else repr(error)
        row = row_of(item)
        reopens = row.dead_letter_id if row else None
        self.letters.append(DeadLetter(item, CONSUMER, reason, detail, reopens=reopens))
        self._notes.append(lambda: _warn(reason, error))

    def _hold(self, item: Item, part: Readable, key: SagaKey) -> None:
        """Keep a reply for those who have the version that it is for: in a rolling deployment not everybody does."""
        row = row_of(item)
        waiting = Waiting.of(item, part, id=self._ports.ids.new(), consumer=holding(*key), now=self._ports.now())
        waiting.dead_letter_id = row.dead_letter_id if row else None
        self.held.append(waiting)
        if key not in self._sagas.missing:
            self._sagas.missing.add(key)
            self._notes.append(lambda: _note_missing(key))

    def drop(self, duplicates: Iterable[UUID]) -> None:
        """Forget new instances whose business key turns out to be taken, with all that they caused."""
        dropped = set(duplicates)
        if not dropped:
            return
        for instance in self.new.values():
            if instance.id in dropped:
                self._note_duplicate(instance)
        self.history = [row for row in self.history if row[0] not in dropped]
        self.messages = [message for message in self.messages if message[0] not in dropped]

    def log(self) -> None:
        """Say what has happened; to be called after the commit, since only then it has."""
        for note in self._notes:
            note()

    # Deciding

    def _take_event(self, item: Item, envelope: Envelope) -> None:
        event = self._sagas.registry.read(envelope)
        definitions = self._sagas.starts.get(envelope.type)
        if definitions is None or not isinstance(event, Event):
            raise UnknownSagaError(f"no saga here starts on {envelope.type}")
        parent, links = tracing.parent_and_links(envelope.traceparent, envelope.tracestate, item.transport)
        decided: list[tuple[Decision, list[tuple[UUID, Outbound]]]] = []
        for definition in definitions:
            with tracing.span(f"saga {definition.name}", parent=parent, kind=SpanKind.CONSUMER, links=links) as span:
                traceparent = tracing.traceparent_of(span)
                given = Started(self._ports.ids.new(), event, envelope.id, self._ports.now(), traceparent)
                decision = decide(definition, None, given)
                if decision is None:
                    continue
                instance = decision.instance
                span.set_attributes({"saga.id": str(instance.id), "saga.key": instance.key, "saga.name": instance.saga})
                if (instance.saga, instance.key) in self.new:
                    self._note_duplicate(instance)
                else:
                    decided.append((decision, self._messages(decision, envelope.id, traceparent)))
        for decision, messages in decided:  # all of them or, after an error, none
            self.new[decision.instance.saga, decision.instance.key] = self._record(decision, _recorded(envelope))
            self.messages += messages

    def _take_reply(self, item: Item, part: Readable, saga: SagaLink) -> None:
        if saga.result is None:
            raise InvalidMessageError("a reply must carry a result")
        instance = self.current.get(saga.saga_id)
        if instance is None:
            raise UnknownSagaError(f"there is no saga instance {saga.saga_id}")
        if (key := (instance.saga, instance.version)) not in self._sagas.by_version:
            self._hold(item, part, key)
            return
        envelope, definition = part.envelope, self._sagas.of(instance)
        outcome = self._outcome(definition, saga, envelope)
        given = Replied(
            saga.step,
            saga.direction,
            saga.attempt,
            saga.result,
            outcome,
            _detail(outcome, envelope) if saga.result is not Result.SUCCEEDED else "",
            envelope.id,
            self._ports.now(),
        )
        name = f"{saga.step} {saga.direction} {saga.result}"
        links = [link for link in (envelope.traceparent, item.transport) if link]
        self._decide(definition, instance, given, name, cause=envelope.id, recorded=_recorded(envelope), links=links)

    def _outcome(self, definition: SagaDefinition, saga: SagaLink, envelope: Envelope) -> Message | None:
        """Return the outcome's message where somebody is going to look at it."""
        step = definition.by_name.get(saga.step)
        if step is None:
            return None
        hook = step.on_succeeded if saga.result is Result.SUCCEEDED else step.on_declined
        if saga.result is Result.FAILED or hook is None or saga.direction is Direction.UNDO:
            try:
                return self._sagas.registry.read(envelope)
            except RejectedError:
                return None  # nobody asked for it; the result alone counts
        outcome = self._sagas.registry.read(envelope)
        if not isinstance(outcome, hook.outcome):
            raise InvalidMessageError(f"{hook.name} takes {hook.outcome.message_type}, the reply is {envelope.type}")
        return outcome

    def _decide(
        self,
        definition: SagaDefinition,
        instance: Instance,
        given: Input,
        name: str,
        *,
        cause: str | None,
        recorded: str | None = None,
        links: Sequence[str] = (),
    ) -> None:
        parent = tracing.context_of(instance.traceparent)
        with tracing.span(f"saga {instance.saga}: {name}", parent=parent, links=links) as span:
            span.set_attribute("saga.id", str(instance.id))
            decision = decide(definition, instance, given)
            if decision is None:
                return
            messages = self._messages(decision, cause, tracing.traceparent_of(span))
            self.current[instance.id] = self._record(decision, recorded)
            self.messages += messages
            if decision.instance.status is Status.NEEDS_ATTENTION:
                tracing.mark_failed(span, decision.instance.reason or "")
                if instance.status is not Status.NEEDS_ATTENTION:
                    self._notes.append(lambda: _alert(decision.instance))

    def _record(self, decision: Decision, given: str | None) -> Instance:
        """Append a transition to the history; return the instance, which keeps the hash of its last one."""
        instance = decision.instance
        row = history_row(instance.id, instance.revision, decision.entry, given=given, head=instance.head)
        self.history.append(row)
        return replace(instance, head=row[-1])

    # Sending

    def _messages(self, decision: Decision, cause: str | None, traceparent: str | None) -> list[tuple[UUID, Outbound]]:
        instance = decision.instance
        return [
            *((instance.id, self._command(instance, each, cause, traceparent)) for each in decision.requests),
            *((instance.id, self._event(instance, each, cause, traceparent)) for each in decision.announcements),
        ]

    def _command(self, instance: Instance, request: Request, cause: str | None, traceparent: str | None) -> Outbound:
        envelope = wrap(
            request.command,
            id=str(request.id),
            source=self._ports.source,
            time=self._ports.time(),
            correlation_id=str(instance.id),
            causation_id=cause,
            traceparent=traceparent,
            saga=SagaLink(
                instance.id,
                request.step,
                request.direction,
                request.attempt,
                undoes=request.undoes,
                undoes_type=request.undoes_type,
            ),
            reply_to=REPLY_ADDRESS,
        )
        return Outbound(envelope, route(request.command), request.command.bundle_limit)

    def _event(
        self, instance: Instance, announcement: Announcement, cause: str | None, traceparent: str | None
    ) -> Outbound:
        envelope = wrap(
            announcement.event,
            id=str(announcement.id),
            source=self._ports.source,
            time=self._ports.time(),
            correlation_id=str(instance.id),
            causation_id=cause,
            traceparent=traceparent,
        )
        return Outbound(envelope, route(announcement.event), announcement.event.bundle_limit)

    # Saying

    def _note_duplicate(self, instance: Instance) -> None:
        self._notes.append(
            lambda: logger.info(
                "%s %s was started before; this start is a duplicate",
                instance.saga,
                instance.key,
                extra={"action": "saga.duplicate_start", "saga": instance.saga, "key": instance.key},
            )
        )


def holding(saga: str, version: int) -> str:
    """Return the consumer for whom replies to instances of a version are held."""
    return f"{CONSUMER}.{saga}.{version}"


def _note_missing(key: SagaKey) -> None:
    logger.warning(
        "replies to saga %s version %d are held: that version is not part of this application",
        *key,
        extra={"action": "saga.unknown_version", "saga": key[0], "version": key[1]},
    )


def _alert(instance: Instance) -> None:
    logger.error(
        "saga %s %s needs attention: %s",
        instance.saga,
        instance.id,
        instance.reason,
        extra={"action": "saga.needs_attention", "saga": instance.saga, "saga_id": str(instance.id)},
    )


def _warn(reason: str, error: Exception) -> None:
    logger.warning(
        "the coordinator cannot take a message: %s: %s",
        reason,
        error,
        exc_info=None if isinstance(error, RejectedError) else error,
        extra={"action": "engine.rejected", "reason": reason},
    )


def _unanswered(instance: Instance, now: datetime) -> str | None:
    """Return the id of the command that is overdue or has failed: what follows from a deadline follows from that."""
    for name, at in instance.steps.items():
        if at.due_at is not None and at.due_at <= now:
            if at.status in (StepStatus.UNDOING, StepStatus.UNDO_RETRYING):
                return str(derive_id(instance.id, name, Direction.UNDO.value, at.undo_attempt))
            return str(derive_id(instance.id, name, Direction.DO.value, at.attempt))
    return None


def _recorded(envelope: Envelope) -> str:
    """Return a message for the history: who said it, and the data as they came."""
    about = to_json({"source": envelope.source, "type": envelope.type, "version": envelope.version}).decode()
    return f'{about[:-1]},"data":{envelope.data.decode()}}}'


def _said(given: Acted) -> str | None:
    """Return for the history what an operator has said beside what has a column."""
    names = ("until", "revision", "resolution", "data")
    said = {name: value for name in names if (value := getattr(given, name)) is not None}
    return to_json(said).decode() if said else None


def _detail(outcome: Message | None, envelope: Envelope) -> str:
    """Return why a step did not succeed, in words; also where the saga does not know the outcome's class."""
    if outcome is not None:
        return describe(outcome)
    reason = from_json(envelope.data).get("reason")
    return str(reason) if reason is not None else envelope.type
