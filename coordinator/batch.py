"""What a batch of messages and deadlines amounts to: decided on in memory, for the engine to write."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from opentelemetry.trace import SpanKind
from pydantic_core import from_json, to_json

from coordinator.acts import NotPossibleError
from coordinator.chain import HistoryRow, history_row
from coordinator.decide import decide, describe, give_up, start
from coordinator.decision import (
    Acted,
    Answer,
    Asked,
    Decision,
    Elapsed,
    Granted,
    Happened,
    Input,
    Recalled,
    Replied,
    Started,
)
from coordinator.definition import SagaDefinition
from coordinator.facts import Facts, child_id
from coordinator.instance import Instance, Origin, Status, StepStatus, step_and_item
from coordinator.outgoing import Outgoing
from coordinator.sagas import CONSUMER, SagaKey, Sagas, UnknownSagaError, holding
from coordinator.transfer import transfer
from coordinator.waiting import Begun, Correlation, Parked, correlations
from coordinator.waits import Early
from events import tracing
from events.codec import Readable
from events.dead_letters import DeadLetter, error_type_of, stack_of
from events.derive import derive_id
from events.envelope import Direction, Envelope, Result, SagaLink
from events.errors import CoordinatorError, InvalidMessageError, RejectedError
from events.ids import Ids
from events.intake import Item
from events.message import Event, Failed, Message, Succeeded
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
        self._sagas = sagas
        self._ports = ports
        self._facts = facts
        self.loaded = dict(facts.loaded)
        self.current = dict(facts.loaded)
        self.begun: dict[tuple[UUID, str], Begun] = {}
        self.over: list[tuple[UUID, str, tuple[str, ...]]] = []
        self.parked: list[Parked] = []
        self.taken: set[UUID] = set()
        self.new: dict[tuple[str, str], Instance] = {}
        self.history: list[HistoryRow] = []
        self.messages: list[tuple[UUID, Outbound]] = []
        self.letters: list[DeadLetter] = []
        self.joining: dict[UUID, str] = {}
        self.held: list[Waiting] = []
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
        return [each.id for each in ended if self._sagas.of(each).lock is not None]

    def admit(self, instances: Iterable[Instance]) -> None:
        """Count instances as loaded as well: they have been locked, or inserted, in this transaction."""
        for instance in instances:
            self.loaded[instance.id] = self.current[instance.id] = instance

    def take(self, item: Item) -> None:
        """Decide on one message; whatever is wrong with it ends as a dead letter and spoils nothing else."""
        part = item.part
        try:
            if not isinstance(part, Readable):
                raise part.error  # noqa: TRY301  # one way to end up as a dead letter
            envelope = part.envelope
            if self._sagas.is_for_child(envelope):
                self._take_command(item, part)
            elif envelope.saga is not None:
                self._take_reply(item, part, envelope.saga)
            else:
                self._take_event(item, envelope)
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

    def awaits_turn(self, saga: UUID) -> bool:
        """Say whether an instance has still not begun, although this application may have its version."""
        instance = self.current.get(saga)
        if instance is None:
            return True
        return instance.status is Status.WAITING and (instance.saga, instance.version) in self._sagas.by_version

    def grant(self, saga: UUID) -> None:
        """Let a loaded instance begin that waits for its business key.

        One whose version this application does not have is left to those that have it.
        """
        instance = self.current[saga]
        definition = self._sagas.by_version.get((instance.saga, instance.version))
        if instance.status is not Status.WAITING or definition is None:
            return
        try:
            self._decide(definition, instance, Granted(self._ports.now()), "granted", cause=None)
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

    def transfer(self, instance: Instance, to: SagaDefinition, *, by: str, why: str) -> None:
        """Take a loaded instance over into another version of its saga.

        Raises:
            UnknownSagaError: its own version is not part of this application.
            NotTransferableError: it must stay.
        """
        old, parent = self._sagas.of(instance), tracing.context_of(instance.traceparent)
        with tracing.span(f"saga {instance.saga}: migrated to version {to.version}", parent=parent) as span:
            decision = transfer(old, to, instance, by=by, why=why, now=self._ports.now())
            messages = self._outgoing(None, tracing.traceparent_of(span)).of(decision)
        self._keep(decision, messages, None)

    def stop(self, instance: Instance, reason: str) -> None:
        """Leave an instance to a person: nothing that it wants to do can be done."""
        decision = give_up(instance, reason, self._ports.now())
        self.current[instance.id] = self._record(decision, None)
        self._notes.append(lambda: _alert(decision.instance))

    def reject(self, item: Item, error: Exception) -> None:
        """Keep a message that cannot be taken, with the reason."""
        reason = error.code if isinstance(error, CoordinatorError) else "failed"
        raised = not isinstance(error, CoordinatorError)  # by a saga's own code
        detail, error_type = (stack_of(error), error_type_of(error)) if raised else (str(error), None)
        self._bury(item, reason, detail, error_type)
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

    def _bury(self, item: Item, reason: str, detail: str, error_type: str | None = None) -> None:
        row = row_of(item)
        reopens = row.dead_letter_id if row else None
        self.letters.append(DeadLetter(item, CONSUMER, reason, detail, error_type=error_type, reopens=reopens))

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

    # Deciding

    def _take_event(self, item: Item, envelope: Envelope) -> None:
        event = self._sagas.registry.read(envelope)
        starts, awaited = self._sagas.starts.get(envelope.type, []), self._sagas.awaited.get(envelope.type, [])
        if not (starts or awaited) or not isinstance(event, Event):
            raise UnknownSagaError(f"no saga here starts on {envelope.type}, or waits for it")
        # All of the starts or, after an error, none; and nobody has heard of the event then.
        started = [self._start(definition, item, envelope, event) for definition in starts]
        found = correlations(awaited, event)
        for decision, messages in started:
            self._add_new(decision, messages, envelope)
        if not found:
            return
        if envelope.key in self._facts.taken or envelope.key in self.taken:
            self._note("%s %s has come before", envelope.type, envelope.id, action="saga.duplicate_event")
            return
        handed_over = [self._hand_over(item, envelope, event, correlation) for correlation in found]
        if any(handed_over):
            self.taken.add(envelope.key)

    def _start(
        self, definition: SagaDefinition, item: Item, envelope: Envelope, message: Message, origin: Origin | None = None
    ) -> tuple[Decision, list[Outbound]]:
        parent, links = tracing.parent_and_links(envelope.traceparent, envelope.tracestate, item.transport)
        with tracing.span(f"saga {definition.name}", parent=parent, kind=SpanKind.CONSUMER, links=links) as span:
            traceparent = tracing.traceparent_of(span)
            identity = self._ports.ids.new() if origin is None else child_id(origin.saga_id, origin.step)
            given = Started(identity, message, envelope.id, self._ports.now(), traceparent, origin)
            decision = start(definition, given)
            instance = decision.instance
            span.set_attributes({"saga.id": str(instance.id), "saga.key": instance.key, "saga.name": instance.saga})
            return decision, self._outgoing(envelope.id, traceparent).of(decision)

    def _add_new(self, decision: Decision, messages: list[Outbound], envelope: Envelope) -> None:
        instance = decision.instance
        if (instance.saga, instance.key) in self.new:
            self._note_duplicate(instance)
            self._refuse_child(instance)
            self.messages += self._refusals
            self._refusals.clear()
            return
        self._keep(decision, messages, _recorded(envelope))

    def _hand_over(self, item: Item, envelope: Envelope, event: Event, correlation: Correlation) -> bool:
        """Give an event to the instances that wait for it, or have waited; say whether it is theirs, or will be."""
        waiting = self._facts.standing.get(correlation.id, [])
        if correlation.key is not None and not waiting:
            named = self._facts.by_key.get((correlation.saga, correlation.key))
            if (over := self.current.get(named) if named else None) and over.status is Status.ARCHIVED:
                about = (envelope.type, envelope.id, over.saga, over.key)
                self._note("%s %s is for %s %s, which is archived", *about, action="saga.archived_event")
                return True
            waiting = [] if named is None else [(named, correlation.wait.name)]
        here = [each for each in waiting if self._has_version(each[0])]
        concerned = [each for each in here if self._happen(item, envelope, event, *each)]
        is_early = not concerned and len(here) == len(waiting)
        if len(here) < len(waiting) or (is_early and correlation.wait.early is Early.PARK):
            self._park(envelope, correlation)  # for later, or for somebody who has that version
            return True
        if is_early and correlation.wait.early is Early.DEAD_LETTER:
            self._bury(item, "early", f"no {correlation.saga} waits for it")
        elif is_early:
            what = ("%s %s is ignored: no %s waits for it", envelope.type, envelope.id, correlation.saga)
            self._note(*what, action="saga.early_event")
        return not is_early

    def _has_version(self, saga_id: UUID) -> bool:
        instance = self.current.get(saga_id)
        return instance is None or (instance.saga, instance.version) in self._sagas.by_version

    def _park(self, envelope: Envelope, correlation: Correlation) -> None:
        identity = derive_id(envelope.key, "parked", correlation.saga, str(correlation.id))
        self.parked.append(Parked(identity, correlation, envelope.type, envelope.encode()))

    def take_parked(self, saga: str, item: Item) -> bool:
        """Decide on an event that was parked for a saga; say whether that is done with it.

        If not, nobody waits for it after all.
        """
        part = item.part
        try:
            if not isinstance(part, Readable):
                raise part.error  # noqa: TRY301  # one way to end up as a dead letter
            event = self._sagas.registry.read(part.envelope)
            if not isinstance(event, Event):
                raise InvalidMessageError(f"{part.envelope.type} is no event")  # noqa: TRY301
            found = correlations(self._sagas.awaited.get(part.envelope.type, []), event)
        except Exception as error:  # noqa: BLE001  # the class of the event may be another one by now
            self.reject(item, error)
            return True
        standing = [each for one in found if one.saga == saga for each in self._facts.standing.get(one.id, [])]
        here = [each for each in standing if self._has_version(each[0])]
        concerned = [each for each in here if self._happen(item, part.envelope, event, *each)]
        return bool(concerned)

    def _happen(self, item: Item, envelope: Envelope, event: Event, saga_id: UUID, step: str) -> bool:
        """Say whether the instance was concerned: it waited, or did once."""
        instance = self.current.get(saga_id)
        if instance is None:
            return False
        given = Happened(step, event, envelope.id, self._ports.now())
        links = [link for link in (envelope.traceparent, item.transport) if link]
        try:
            definition = self._sagas.of(instance)
            name, said = f"{step} {envelope.type}", _recorded(envelope)
            self._decide(definition, instance, given, name, cause=envelope.id, recorded=said, links=links)
        except Exception as error:
            logger.exception("saga %s cannot be decided on", instance.id, extra={"action": "saga.undecidable"})
            self.stop(instance, f"{step} cannot take {envelope.type}: {error!r}")
        return self.current[saga_id] is not instance

    def _take_command(self, item: Item, part: Readable) -> None:
        """A parent asks for what its child is there for, or to undo it."""
        envelope, link = part.envelope, part.envelope.saga
        if link is None or envelope.reply_to is None:
            raise InvalidMessageError(f"{envelope.type} starts a child; only a step of a saga can send it")
        origin = Origin(link.saga_id, link.step, link.attempt, envelope.reply_to)
        identity, now = child_id(link.saga_id, link.step), self._ports.now()
        instance = self._known(identity)
        if instance is not None and not self._sagas.has_version(instance):
            self._hold(item, part, (instance.saga, instance.version))
        elif instance is not None:
            given = (
                Asked(origin, envelope.id, now)
                if link.direction is Direction.DO
                else Recalled(link.attempt, envelope.id, now)
            )
            name, said = given.__class__.__name__.lower(), _recorded(envelope)
            self._decide(self._sagas.of(instance), instance, given, name, cause=envelope.id, recorded=said)
        elif link.direction is Direction.UNDO:
            self._bar(envelope, link, replace(origin, undo_attempt=link.attempt), identity)
        elif envelope.key in self._facts.taken or envelope.key in self.taken:
            self._note("%s %s was undone before it began", envelope.type, envelope.id, action="saga.barred")
        else:
            message = self._sagas.registry.read(envelope)
            decision, messages = self._start(self._sagas.children[envelope.type], item, envelope, message, origin)
            self.taken.add(envelope.key)
            self._add_new(decision, messages, envelope)

    def _bar(self, envelope: Envelope, link: SagaLink, origin: Origin, identity: UUID) -> None:
        """There is nothing to undo, and there shall not be: the command will find itself taken already."""
        if link.undoes is not None:
            self.taken.add(link.undoes)
        undone = Answer(
            derive_id(identity, "answer", "undo", link.attempt),
            origin,
            link.direction,
            link.attempt,
            Result.SUCCEEDED,
            Succeeded(),
        )
        self.messages.append((identity, self._outgoing(envelope.id, envelope.traceparent).answer(undone)))

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
        self._refusals.append((instance.id, self._outgoing(None, instance.traceparent).answer(answer)))

    def _known(self, identity: UUID) -> Instance | None:
        return self.current.get(identity) or next((each for each in self.new.values() if each.id == identity), None)

    def _outgoing(self, cause: str | None, traceparent: str | None) -> Outgoing:
        return Outgoing(self._ports.source, self._ports.time, cause, traceparent)

    def _take_reply(self, item: Item, part: Readable, saga: SagaLink) -> None:
        if saga.result is None:
            raise InvalidMessageError("a reply must carry a result")
        instance = self.current.get(saga.saga_id)
        if instance is None:
            raise UnknownSagaError(f"there is no saga instance {saga.saga_id}")
        if not self._sagas.has_version(instance):
            self._hold(item, part, (instance.saga, instance.version))
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
        name = f"{step_and_item(saga.step)[0]} {saga.direction} {saga.result}"
        links = [link for link in (envelope.traceparent, item.transport) if link]
        self._decide(definition, instance, given, name, cause=envelope.id, recorded=_recorded(envelope), links=links)

    def _outcome(self, definition: SagaDefinition, saga: SagaLink, envelope: Envelope) -> Message | None:
        """Return the outcome's message where somebody is going to look at it."""
        step = definition.step_of(saga.step)
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
            messages = self._outgoing(cause, tracing.traceparent_of(span)).of(decision)
            self._keep(decision, messages, recorded)
            if decision.instance.status is Status.NEEDS_ATTENTION:
                tracing.mark_failed(span, decision.instance.reason or "")
                if instance.status is not Status.NEEDS_ATTENTION:
                    self._notes.append(lambda: _alert(decision.instance))

    def _keep(self, decision: Decision, messages: Iterable[Outbound], recorded: str | None) -> None:
        """Keep what was decided, with its row of the history, whose hash the instance has."""
        instance = self._record(decision, recorded)
        if instance.id in self.loaded:
            self.current[instance.id] = instance
        else:
            self.new[instance.saga, instance.key] = instance
            if decision.lock is not None:
                self.joining[instance.id] = decision.lock
        self.messages += [(instance.id, message) for message in messages]
        if not (decision.waits or decision.over):
            return
        definition = self._sagas.of(instance)
        events = {wait.name: tuple(each.message_type for each in wait.events) for wait in definition.waits}
        for each in decision.waits:
            begun = Begun(instance.id, instance.saga, each.step, events[each.step], each.values)
            self.begun[instance.id, each.step] = begun
        for step in decision.over:
            if self.begun.pop((instance.id, step), None) is None:
                self.over.append((instance.id, step, events[step]))

    def _record(self, decision: Decision, given: str | None) -> Instance:
        """Append a transition to the history; return the instance, which keeps the hash of its last one."""
        instance = decision.instance
        row = history_row(instance.id, instance.revision, decision.entry, given=given, head=instance.head)
        self.history.append(row)
        return replace(instance, head=row[-1])

    # Saying

    def _note(self, text: str, *about: str, action: str) -> None:
        self._notes.append(lambda: logger.info(text, *about, extra={"action": action}))

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
