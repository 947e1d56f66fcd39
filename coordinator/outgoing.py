"""What decisions say, as messages: commands, events, and the answers of children."""

from collections.abc import Callable
from datetime import datetime

from coordinator.decision import Announcement, Answer, Decision, Request
from coordinator.instance import Instance
from events.bus import Address, Exchange
from events.envelope import SagaLink, wrap
from events.outbox import Outbound, route


class Outgoing:
    """Puts what one decision says into envelopes.

    Args:
        source: who speaks.
        reply_to: where answers to commands go.
        time: the local time of day.
        cause: the id of the message that it follows from.
        traceparent: the span of the decision.
    """

    def __init__(
        self, source: str, reply_to: str, *, time: Callable[[], datetime], cause: str | None, traceparent: str | None
    ) -> None:
        self._source = source
        self._reply_to = reply_to
        self._time = time
        self._cause = cause
        self._traceparent = traceparent

    def of(self, decision: Decision) -> list[Outbound]:
        """Return all messages of a decision."""
        return [
            *(self._command(decision.instance, each) for each in decision.requests),
            *(self._event(decision.instance, each) for each in decision.announcements),
            *(self.answer(each) for each in decision.answers),
        ]

    def _command(self, instance: Instance, request: Request) -> Outbound:
        envelope = wrap(
            request.command,
            id=str(request.id),
            source=self._source,
            time=self._time(),
            correlation_id=str(instance.id),
            causation_id=self._cause,
            traceparent=self._traceparent,
            saga=SagaLink(
                instance.id,
                request.step,
                request.direction,
                request.attempt,
                undoes=request.undoes,
                undoes_type=request.undoes_type,
            ),
            reply_to=self._reply_to,
        )
        return Outbound(envelope, route(request.command), request.command.bundle_limit)

    def _event(self, instance: Instance, announcement: Announcement) -> Outbound:
        envelope = wrap(
            announcement.event,
            id=str(announcement.id),
            source=self._source,
            time=self._time(),
            correlation_id=str(instance.id),
            causation_id=self._cause,
            traceparent=self._traceparent,
        )
        return Outbound(envelope, route(announcement.event), announcement.event.bundle_limit)

    def answer(self, answer: Answer) -> Outbound:
        """Return the reply of a child to its parent."""
        origin = answer.origin
        envelope = wrap(
            answer.message,
            id=str(answer.id),
            source=self._source,
            time=self._time(),
            correlation_id=str(origin.saga_id),
            causation_id=self._cause,
            traceparent=self._traceparent,
            saga=SagaLink(origin.saga_id, origin.step, answer.direction, answer.attempt, answer.result),
        )
        return Outbound(envelope, Address(Exchange.REPLIES, origin.reply_to))
