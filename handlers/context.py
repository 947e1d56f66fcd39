"""What a handler is told beside its message, and how it says no."""

from dataclasses import dataclass, field
from uuid import UUID

from events.envelope import Direction
from events.errors import CoordinatorError
from events.message import Event, Refused, Reply


@dataclass(slots=True)
class Context:
    """The message's surroundings; a handler gets one by naming a parameter of this type.

    Attributes:
        message_id: the id of this message, the same at every redelivery.
        idempotency_key: what to hand to third parties so that they act once. It is the same for every
            attempt of one saga step in one direction, and the message's own key elsewhere.
        correlation_id: what this message belongs to.
        saga_id, step, direction: the saga that sent this command; None for other messages.
        attempt: which try this is, from 1; over all processes and redeliveries.
    """

    message_id: str
    idempotency_key: str
    correlation_id: str | None = None
    saga_id: UUID | None = None
    step: str | None = None
    direction: Direction | None = None
    attempt: int = 1
    published: list[Event] = field(default_factory=list)

    def publish(self, event: Event) -> None:
        """Publish `event` with this handler's commit: if and only if its work is recorded."""
        self.published.append(event)


class Declined(CoordinatorError):  # noqa: N818  # it reads as the business says it: raise Declined(...)
    """A business no: recorded and replied, never retried. Takes an event, a reply, or a reason in words."""

    code = "declined"

    def __init__(self, outcome: Event | Reply | str) -> None:
        super().__init__(outcome if isinstance(outcome, str) else outcome.message_type)
        self.outcome: Event | Reply = Refused(reason=outcome) if isinstance(outcome, str) else outcome


class RetryAfter(CoordinatorError):  # noqa: N818  # the name of the HTTP header that it stands for
    """A technical failure that says when another try may help; it is then tried neither before nor long after.

    Any other exception with a number, or a `timedelta`, in an attribute `retry_after` is understood likewise.

    Args:
        seconds: how long to wait.
        why: in words, for people.
    """

    code = "retry_after"

    def __init__(self, seconds: float, why: str = "asked to come again later") -> None:
        super().__init__(f"{why}; again in {seconds:g} s")
        self.retry_after = seconds
