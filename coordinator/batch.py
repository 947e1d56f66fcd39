"""What a batch of messages and deadlines amounts to: decided on in memory, for the engine to write."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID
from zlib import crc32

from pydantic_core import to_json

from coordinator.acts import NotPossibleError
from coordinator.chain import HistoryRow, history_row
from coordinator.decide import decide, give_up
from coordinator.decision import Acted, Answer, Decision, Elapsed, Granted, Input
from coordinator.definition import SagaDefinition
from coordinator.facts import Facts
from coordinator.instance import Instance, Status, StepStatus
from coordinator.outgoing import Outgoing
from coordinator.sagas import CONSUMER, SagaKey, Sagas, UnknownSagaError, holding
from coordinator.transfer import transfer
from coordinator.waiting import Begun, ParkedEvent, correlation_id
from events import tracing
from events.codec import Readable
from events.dead_letters import DeadLetter, error_type_of, stack_of
from events.derive import derive_id
from events.envelope import Direction, Result
from events.errors import CoordinatorError, RejectedError
from events.ids import Ids
from events.intake import Item
from events.message import Failed
from events.outbox import Outbound
from handlers.retries import Waiting, row_of

logger = logging.getLogger(__name__)

Note = Callable[[], None]


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
        begun: parts of flows that begin to wait, by instance and step.
        over: parts that wait no more, with the types of what they have waited for.
        parked: events that no instance waits for yet.
        taken: the keys of messages that shall not be taken a second time.
        joining: the business keys that new instances wait for.
        held: messages to instances of versions that this application does not have, for processes that have them.
    """

    def __init__(self, sagas: Sagas, ports: Ports, facts: Facts) -> None:
        self.sagas = sagas
        self.ports = ports
        self.facts = facts
        self.loaded = dict(facts.loaded)
        self.current = dict(facts.loaded)
        self.begun: dict[tuple[UUID, str], Begun] = {}
        self.over: list[tuple[UUID, str, tuple[str, ...]]] = []
        self.parked: list[ParkedEvent] = []
        self.taken: set[UUID] = set()
        self.new: dict[tuple[str, str], Instance] = {}
        self.history: list[HistoryRow] = []
        self.messages: list[tuple[UUID, Outbound]] = []
        self.letters: list[DeadLetter] = []
        self.joining: dict[UUID, str] = {}
        self.held: list[Waiting] = []
        self._standing: dict[UUID, list[tuple[UUID, str]]] = {}
        self._keys: dict[UUID, tuple[str, str]] = {}  # of new instances
        self._notes: list[Note] = []
        self._refusals: list[tuple[UUID, Outbound]] = []
        self._dropped: set[UUID] = set()

    @property
    def changed(self) -> list[Instance]:
        """The loaded instances of which something was decided."""
        return [instance for identity, instance in self.current.items() if instance is not self.loaded[identity]]

    @property
    def fresh(self) -> list[Instance]:
        """The new instances that were not dropped."""
        return [instance for instance in self.new.values() if instance.id not in self._dropped]

    @property
    def leaving(self) -> list[UUID]:
        """The instances that have ended, of sagas that hold a business key until then."""
        ended = (each for each in self.changed if each.status.ended and not self.loaded[each.id].status.ended)
        return [each.id for each in ended if self.sagas.of(each).lock is not None]

    @property
    def begun_for(self) -> list[UUID]:
        """The correlations that parts of flows begin to wait for."""
        return [correlation_id(each.saga, event, each.values) for each in self.begun.values() for event in each.events]

    def admit(self, instances: Iterable[Instance]) -> None:
        """Count instances as loaded as well: they have been locked, or inserted, in this transaction."""
        for instance in instances:
            self.loaded[instance.id] = self.current[instance.id] = instance

    def elapse(self, instance: Instance, now: datetime) -> None:
        """Decide on an instance of which a deadline has passed by `now`: its own, that of a step or of an item."""
        with self.stopping(instance, "deadline"):
            self.decide(instance, Elapsed(now), "deadline", cause=_unanswered(instance, now))

    def awaits_turn(self, saga: UUID) -> bool:
        """Say whether an instance has still not begun, although this application may have its version."""
        instance = self.current.get(saga)
        if instance is None:
            return True
        return instance.status is Status.WAITING and (instance.saga, instance.version) in self.sagas.by_version

    def grant(self, saga: UUID) -> None:
        """Let a loaded instance begin that waits for its business key.

        One whose version this application does not have is left to those that have it.
        """
        if self.awaits_turn(saga):
            instance = self.current[saga]
            with self.stopping(instance, "granted"):
                self.decide(instance, Granted(self.ports.now()), "granted", cause=None)

    def act(self, saga: UUID, given: Acted) -> Instance | CoordinatorError:
        """Decide on what an operator does to a loaded instance; return the instance, or why it is refused."""
        try:
            instance = self.loaded.get(saga)
            if instance is None:
                raise UnknownSagaError(f"there is no saga instance {saga} any more")  # noqa: TRY301  # one way out
            self.decide(instance, given, given.verb.value, cause=None, recorded=_said(given))
        except CoordinatorError as error:
            return error
        except Exception as error:  # noqa: BLE001  # a state that its class cannot read, say
            return NotPossibleError(f"the saga cannot be decided on: {error!r}")
        return self.current[saga]

    def transfer(self, instance: Instance, to: SagaDefinition, *, by: str, why: str) -> None:
        """Take a loaded instance over into another version of its saga.

        Raises:
            UnknownSagaError: its own version is not part of this application.
            NotTransferableError: it must stay.
        """
        old, parent = self.sagas.of(instance), tracing.context_of(instance.traceparent)
        with tracing.span(f"saga {instance.saga}: migrated to version {to.version}", parent=parent) as span:
            decision = transfer(old, to, instance, by=by, why=why, now=self.ports.now())
            messages = self.outgoing(None, tracing.traceparent_of(span)).of(decision)
        self.keep(decision, messages, None)

    # What its callers decide with

    def decide(
        self,
        instance: Instance,
        given: Input,
        name: str,
        *,
        cause: str | None,
        recorded: str | None = None,
        links: Sequence[str] = (),
    ) -> None:
        """Decide on an input to an instance, in a span of its trace that is linked to others.

        Args:
            instance: one of `current`, or a new one.
            given: the input.
            name: what the span is called.
            cause: the id of the message that it follows from.
            recorded: the input, for the history.
            links: the traces that the input comes from.
        """
        definition = self.sagas.of(instance)
        parent = tracing.context_of(instance.traceparent)
        with tracing.span(f"saga {instance.saga}: {name}", parent=parent, links=links) as span:
            span.set_attribute("saga.id", str(instance.id))
            decision = decide(definition, instance, given)
            if decision is None:
                return
            messages = self.outgoing(cause, tracing.traceparent_of(span)).of(decision)
            self.keep(decision, messages, recorded)
            if decision.instance.status is Status.NEEDS_ATTENTION:
                tracing.mark_failed(span, decision.instance.reason or "")
                if instance.status is not Status.NEEDS_ATTENTION:
                    self._notes.append(lambda: _alert(decision.instance))

    @contextmanager
    def stopping(self, instance: Instance, name: str) -> Iterator[None]:
        """Leave an instance to a person if it cannot be decided on in this block: nobody else could be told of it."""
        try:
            yield
        except Exception as error:
            logger.exception("saga %s cannot be decided on", instance.id, extra={"action": "saga.undecidable"})
            self.stop(instance, f"{instance.saga} cannot be decided on ({name}): {error!r}")

    def add(self, decision: Decision, messages: list[Outbound], recorded: str) -> None:
        """Keep a start, unless one of this batch has its business key."""
        instance = decision.instance
        if (instance.saga, instance.key) in self.new:
            self._note_duplicate(instance)
            self._refuse_child(instance)
            self.messages += self._refusals
            self._refusals.clear()
            return
        self.keep(decision, messages, recorded)
        if instance.status is Status.NEEDS_ATTENTION:
            self._notes.append(lambda: None if instance.id in self._dropped else _alert(instance))

    def known(self, identity: UUID) -> Instance | None:
        """Return an instance that was loaded or is new."""
        return self.current.get(identity) or (self.new[self._keys[identity]] if identity in self._keys else None)

    def waiting(self, correlation: UUID) -> list[tuple[UUID, str]]:
        """Return the loaded instances and steps that wait for an event by now, after what was decided."""
        known = [*self.facts.standing.get(correlation, ()), *self._standing.get(correlation, ())]
        return [(saga_id, name) for saga_id, name in known if self._waits(saga_id, name)]

    def will_wait(self, correlation: UUID) -> bool:
        """Say whether a new instance waits for an event; it may turn out to be a duplicate."""
        return any(saga_id in self._keys for saga_id, _ in self._standing.get(correlation, ()))

    def keep(self, decision: Decision, messages: Sequence[Outbound], recorded: str | None) -> None:
        """Keep what was decided, with its row of the history, whose hash the instance has."""
        instance = self._record(decision, messages, recorded)
        if instance.id in self.loaded:
            self.current[instance.id] = instance
        else:
            self._keys[instance.id] = key = (instance.saga, instance.key)
            self.new[key] = instance
            if decision.lock is not None:
                self.joining[instance.id] = decision.lock
        self.messages += [(instance.id, message) for message in messages]
        if not (decision.waits or decision.over):
            return
        definition = self.sagas.of(instance)
        events = {wait.name: tuple(each.message_type for each in wait.events) for wait in definition.waits}
        for each in decision.waits:
            begun = Begun(instance.id, instance.saga, each.step, events[each.step], each.values)
            self.begun[instance.id, each.step] = begun
            for event in events[each.step]:
                correlation = correlation_id(begun.saga, event, begun.values)
                self._standing.setdefault(correlation, []).append((instance.id, each.step))
        for step in decision.over:
            if self.begun.pop((instance.id, step), None) is None:
                self.over.append((instance.id, step, events[step]))

    def stop(self, instance: Instance, reason: str) -> None:
        """Leave an instance to a person: nothing that it wants to do can be done."""
        decision = give_up(instance, reason, self.ports.now())
        self.current[instance.id] = self._record(decision, (), None)
        self._notes.append(lambda: _alert(decision.instance))

    def reject(self, item: Item, error: Exception) -> None:
        """Keep a message that cannot be taken, with the reason."""
        reason = error.code if isinstance(error, CoordinatorError) else "failed"
        raised = not isinstance(error, CoordinatorError)  # by a saga's own code
        detail, error_type = (stack_of(error), error_type_of(error)) if raised else (str(error), None)
        self.bury(item, reason, detail, error_type)
        self._notes.append(lambda: _warn(reason, error))

    def hold(self, item: Item, part: Readable, key: SagaKey) -> None:
        """Keep a reply for those who have the version that it is for: in a rolling deployment not everybody does."""
        row = row_of(item)
        waiting = Waiting.of(item, part, id=self.ports.ids.new(), consumer=holding(*key), now=self.ports.now())
        waiting.dead_letter_id = row.dead_letter_id if row else None
        self.held.append(waiting)
        if key not in self.sagas.missing:
            self.sagas.missing.add(key)
            self._notes.append(lambda: _note_missing(key))

    def bury(self, item: Item, reason: str, detail: str, error_type: str | None = None) -> None:
        """Make a dead letter of a message; `detail` is for people."""
        row = row_of(item)
        reopens = row.dead_letter_id if row else None
        self.letters.append(DeadLetter(item, CONSUMER, reason, detail, error_type=error_type, reopens=reopens))

    def outgoing(self, cause: str | None, traceparent: str | None) -> Outgoing:
        """Return what makes messages of decisions that follow from the message `cause`."""
        ports = self.ports
        return Outgoing(ports.source, self.sagas.reply_address, time=ports.time, cause=cause, traceparent=traceparent)

    def note(self, text: str, *about: str, action: str) -> None:
        """Log something after the commit."""
        self._notes.append(lambda: logger.info(text, *about, extra={"action": action}))

    # Before and after the commit

    def drop(self, duplicates: Iterable[UUID]) -> None:
        """Forget new instances whose business key turns out to be taken, with all that they caused."""
        dropped = self._dropped = set(duplicates)
        if not dropped:
            return
        for instance in self.new.values():
            if instance.id in dropped:
                self._note_duplicate(instance)
                self._refuse_child(instance)
        self.history = [row for row in self.history if row[0] not in dropped]
        self.messages = [message for message in self.messages if message[0] not in dropped] + self._refusals
        self.begun = {key: begun for key, begun in self.begun.items() if begun.saga_id not in dropped}
        self.joining = {saga: key for saga, key in self.joining.items() if saga not in dropped}

    def log(self) -> None:
        """Say what has happened; to be called after the commit, since only then it has."""
        for note in self._notes:
            note()

    def _waits(self, saga_id: UUID, name: str) -> bool:
        at = self.current[saga_id].steps.get(name) if saga_id in self.current else None
        return at is not None and at.status is StepStatus.WAITING

    def _refuse_child(self, instance: Instance) -> None:
        """Another saga has the business key of a child: its parent must know."""
        if instance.origin is None:
            return
        reason = f"there is another {instance.saga} with the business key {instance.key}"
        failed = Failed(code="duplicate_key", reason=reason, attempts=1)
        origin = instance.origin
        answer = Answer(
            derive_id(instance.id, "answer", "do", origin.attempt),
            origin,
            Direction.DO,
            origin.attempt,
            Result.FAILED,
            failed,
        )
        self._refusals.append((instance.id, self.outgoing(None, instance.traceparent).answer(answer)))

    def _record(self, decision: Decision, messages: Sequence[Outbound], given: str | None) -> Instance:
        """Append a transition to the history; return the instance, which keeps the hash of its last one."""
        instance, entry = decision.instance, decision.entry
        said = zip(entry.sent, messages, strict=True)
        sent = [{**about, "crc32": crc32(each.envelope.data)} for about, each in said]  # quick, and nobody forges it
        row = history_row(instance.id, instance.revision, entry, given=given, sent=sent, head=instance.head)
        self.history.append(row)
        return replace(instance, head=row[-1])

    def _note_duplicate(self, instance: Instance) -> None:
        self._notes.append(
            lambda: logger.info(
                "%s %s was started before; this start is a duplicate",
                instance.saga,
                instance.key,
                extra={"action": "saga.duplicate_start", "saga": instance.saga, "key": instance.key},
            )
        )


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


def _said(given: Acted) -> str | None:
    """Return for the history what an operator has said beside what has a column."""
    names = ("until", "revision", "resolution", "data")
    said = {name: value for name in names if (value := getattr(given, name)) is not None}
    return to_json(said).decode() if said else None
