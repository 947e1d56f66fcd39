"""What the messages of a batch mean: replies to commands, business events, and the commands that children start on."""

from dataclasses import replace
from uuid import UUID

from opentelemetry.trace import SpanKind
from pydantic_core import from_json, to_json

from coordinator.batch import Batch
from coordinator.decide import describe, start
from coordinator.decision import Answer, Asked, Decision, Happened, Recalled, Replied, Started
from coordinator.definition import SagaDefinition
from coordinator.facts import child_id
from coordinator.instance import Origin, Status, step_and_item
from coordinator.sagas import UnknownSagaError
from coordinator.waiting import Correlation, ParkedEvent, correlations
from coordinator.waits import Early
from events import tracing
from events.codec import Readable
from events.derive import derive_id
from events.envelope import Direction, Envelope, Result, SagaLink
from events.errors import InvalidMessageError, RejectedError
from events.intake import Item
from events.message import Event, Message, Succeeded
from events.outbox import Outbound


class Arrivals:
    """Takes messages into a batch, one after the other."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._sagas = batch.sagas
        self._ports = batch.ports
        self._facts = batch.facts

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
            self._batch.reject(item, error)

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
            self._batch.reject(item, error)
            return True
        standing = [each for one in found if one.saga == saga for each in self._batch.waiting(one.id)]
        here = [each for each in standing if self._has_version(each[0])]
        concerned = [each for each in here if self._happen(item, part.envelope, event, *each)]
        return bool(concerned)

    def _take_event(self, item: Item, envelope: Envelope) -> None:
        event = self._sagas.registry.read(envelope)
        starts, awaited = self._sagas.starts.get(envelope.type, []), self._sagas.awaited.get(envelope.type, [])
        if not (starts or awaited) or not isinstance(event, Event):
            raise UnknownSagaError(f"no saga here starts on {envelope.type}, or waits for it")
        # All of the starts or, after an error, none; and nobody has heard of the event then.
        started = [self._start(definition, item, envelope, event) for definition in starts]
        found = correlations(awaited, event)
        for decision, messages in started:
            self._batch.add(decision, messages, _recorded(envelope))
        if not found:
            return
        if envelope.key in self._facts.taken or envelope.key in self._batch.taken:
            self._batch.note("%s %s has come before", envelope.type, envelope.id, action="saga.duplicate_event")
            return
        handed_over = [self._hand_over(item, envelope, event, correlation) for correlation in found]
        if any(handed_over):
            self._batch.taken.add(envelope.key)

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
            return decision, self._batch.outgoing(envelope.id, traceparent).of(decision)

    def _hand_over(self, item: Item, envelope: Envelope, event: Event, correlation: Correlation) -> bool:
        """Give an event to the instances that wait for it, or have waited; say whether it is theirs, or will be."""
        waiting = self._batch.waiting(correlation.id)
        if correlation.key is not None and not waiting:
            stood = self._facts.standing.get(correlation.id)  # another message of this batch was faster
            named = stood[0][0] if stood else self._facts.by_key.get((correlation.saga, correlation.key))
            if (over := self._batch.current.get(named) if named else None) and over.status is Status.ARCHIVED:
                about = (envelope.type, envelope.id, over.saga, over.key)
                self._batch.note("%s %s is for %s %s, which is archived", *about, action="saga.archived_event")
                return True
            waiting = [] if named is None else [(named, correlation.wait.name)]
        here = [each for each in waiting if self._has_version(each[0])]
        concerned = [each for each in here if self._happen(item, envelope, event, *each)]
        is_early = not concerned and len(here) == len(waiting)
        is_kept = correlation.wait.early is Early.PARK or self._batch.will_wait(correlation.id)
        if len(here) < len(waiting) or (is_early and is_kept):
            self._park(envelope, correlation)  # for later, or for somebody who has that version
            return True
        if is_early and correlation.wait.early is Early.DEAD_LETTER:
            self._batch.bury(item, "early", f"no {correlation.saga} waits for it")
        elif is_early:
            what = ("%s %s is ignored: no %s waits for it", envelope.type, envelope.id, correlation.saga)
            self._batch.note(*what, action="saga.early_event")
        return not is_early

    def _has_version(self, saga_id: UUID) -> bool:
        instance = self._batch.current.get(saga_id)
        return instance is None or (instance.saga, instance.version) in self._sagas.by_version

    def _park(self, envelope: Envelope, correlation: Correlation) -> None:
        identity = derive_id(envelope.key, "parked", correlation.saga, str(correlation.id))
        self._batch.parked.append(ParkedEvent(identity, correlation, envelope.type, envelope.encode()))

    def _happen(self, item: Item, envelope: Envelope, event: Event, saga_id: UUID, step: str) -> bool:
        """Say whether the instance was concerned: it waited, or did once."""
        instance = self._batch.current.get(saga_id)
        if instance is None:
            return False
        given, said = Happened(step, event, envelope.id, self._ports.now()), _recorded(envelope)
        name, links = f"{step} {envelope.type}", _links(item, envelope)
        with self._batch.stopping(instance, name):
            self._batch.decide(instance, given, name, cause=envelope.id, recorded=said, links=links)
        return self._batch.current[saga_id] is not instance

    def _take_command(self, item: Item, part: Readable) -> None:
        """A parent asks for what its child is there for, or to undo it."""
        envelope, link = part.envelope, part.envelope.saga
        if link is None or envelope.reply_to is None:
            raise InvalidMessageError(f"{envelope.type} starts a child; only a step of a saga can send it")
        origin = Origin(link.saga_id, link.step, link.attempt, envelope.reply_to)
        identity, now = child_id(link.saga_id, link.step), self._ports.now()
        instance = self._batch.known(identity)
        if instance is not None and not self._sagas.has_version(instance):
            self._batch.hold(item, part, (instance.saga, instance.version))
        elif instance is not None:
            given = (
                Asked(origin, envelope.id, now)
                if link.direction is Direction.DO
                else Recalled(link.attempt, envelope.id, now)
            )
            name, said = given.__class__.__name__.lower(), _recorded(envelope)
            self._batch.decide(instance, given, name, cause=envelope.id, recorded=said)
        elif link.direction is Direction.UNDO:
            self._bar(envelope, link, replace(origin, undo_attempt=link.attempt), identity)
        elif envelope.key in self._facts.taken or envelope.key in self._batch.taken:
            self._batch.note("%s %s was undone before it began", envelope.type, envelope.id, action="saga.barred")
        else:
            message = self._sagas.registry.read(envelope)
            decision, messages = self._start(self._sagas.children[envelope.type], item, envelope, message, origin)
            self._batch.taken.add(envelope.key)
            self._batch.add(decision, messages, _recorded(envelope))

    def _bar(self, envelope: Envelope, link: SagaLink, origin: Origin, identity: UUID) -> None:
        """There is nothing to undo, and there shall not be: the command will find itself taken already."""
        if link.undoes is not None and link.undoes not in self._facts.taken:
            self._batch.taken.add(link.undoes)
        undone = Answer(
            derive_id(identity, "answer", "undo", link.attempt),
            origin,
            link.direction,
            link.attempt,
            Result.SUCCEEDED,
            Succeeded(),
        )
        self._batch.messages.append((identity, self._batch.outgoing(envelope.id, envelope.traceparent).answer(undone)))

    def _take_reply(self, item: Item, part: Readable, saga: SagaLink) -> None:
        if saga.result is None:
            raise InvalidMessageError("a reply must carry a result")
        instance = self._batch.current.get(saga.saga_id)
        if instance is None:
            raise UnknownSagaError(f"there is no saga instance {saga.saga_id}")
        if not self._sagas.has_version(instance):
            self._batch.hold(item, part, (instance.saga, instance.version))
            return
        envelope = part.envelope
        outcome = self._outcome(self._sagas.of(instance), saga, envelope)
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
        said, links = _recorded(envelope), _links(item, envelope)
        self._batch.decide(instance, given, name, cause=envelope.id, recorded=said, links=links)

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


def _links(item: Item, envelope: Envelope) -> list[str]:
    """Return the traces that a message comes from: its sender's, and its transport's."""
    return [link for link in (envelope.traceparent, item.transport) if link]


def _recorded(envelope: Envelope) -> str:
    """Return a message for the history: who said it, and the data as they came."""
    about = to_json({"source": envelope.source, "type": envelope.type, "version": envelope.version}).decode()
    return f'{about[:-1]},"data":{envelope.data.decode()}}}'


def _detail(outcome: Message | None, envelope: Envelope) -> str:
    """Return why a step did not succeed, in words; also where the saga does not know the outcome's class."""
    if outcome is not None:
        return describe(outcome)
    reason = from_json(envelope.data).get("reason")
    return str(reason) if reason is not None else envelope.type
