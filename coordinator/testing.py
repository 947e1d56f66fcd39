"""Unit tests of sagas, in the words of the business: no broker, no database, and time stands still until moved.

run = SagaRun(PlaceOrder, OrderPlaced(order_id=order, card="stolen"))
assert run.sent == [ReserveStock(order_id=order)]
run.succeeds()
assert run.sent == [ChargeCard(order_id=order, card="stolen")]
run.declines("the card was reported stolen")
assert run.sent == [ReleaseStock(order_id=order)]
run.succeeds()
assert run.status == "compensated"
assert run.published == [OrderCancelled(order_id=order, reason="charge declined: the card was reported stolen")]
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Self
from uuid import UUID

from coordinator.decide import decide, describe
from coordinator.decision import (
    Acted,
    Answer,
    Decision,
    Elapsed,
    Granted,
    Happened,
    Input,
    Recalled,
    Replied,
    Request,
    Resolution,
    Started,
    Verb,
)
from coordinator.definition import Saga
from coordinator.instance import Instance, Origin, Status
from coordinator.transfer import transfer
from events.envelope import Direction, Result
from events.message import Command, Event, Failed, Message, Refused

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
SAGA_ID = UUID("01900000-0000-7000-8000-000000000001")
PARENT_ID = UUID("01900000-0000-7000-8000-000000000002")


class SagaRun:
    """One saga, decided on by hand: start it, answer what it sends, let time pass, and look.

    Args:
        saga: the saga class.
        event: the event that starts it, or the command of a parent.
        waiting: another saga holds its business key: it begins when it `is_granted`.

    Attributes:
        now: the time that the next decision is told.
        decisions: all that was decided so far, the newest last.
    """

    def __init__(self, saga: type[Saga], event: Event | Command, *, waiting: bool = False) -> None:
        self.definition = saga.definition
        self.now = BEGIN
        self.decisions: list[Decision] = []
        self._messages = 0
        self._since = 0
        origin = Origin(PARENT_ID, "child", 1, "tests") if isinstance(event, Command) else None
        self.take(Started(SAGA_ID, event, self._message_id(), self.now, "00-trace-01", origin))
        if self.status is Status.WAITING and not waiting:
            self.is_granted()

    # What can be looked at

    @property
    def last(self) -> Decision:
        """The last decision."""
        return self.decisions[-1]

    @property
    def instance(self) -> Instance:
        """The instance as it would be stored."""
        return self.last.instance

    @property
    def saga(self) -> Saga:
        """The saga with its state."""
        return self.definition.cls.from_state(self.instance.state)

    @property
    def status(self) -> Status:
        """Where it stands; a `Status` equals its name."""
        return self.instance.status

    @property
    def reason(self) -> str | None:
        """Why it is undone or needs attention."""
        return self.instance.reason

    @property
    def sent(self) -> list[Command]:
        """The commands that were sent since the last thing happened."""
        return [request.command for decision in self.decisions[self._since :] for request in decision.requests]

    @property
    def answered(self) -> list[Answer]:
        """All that it has told its parent."""
        return [answer for decision in self.decisions for answer in decision.answers]

    @property
    def published(self) -> list[Event]:
        """All events that it has published."""
        return [each.event for decision in self.decisions for each in decision.announcements]

    # What can happen

    def succeeds(self, outcome: Message | None = None, *, step: str | None = None) -> Self:
        """Let the outstanding command (that of `step`, if there are several) succeed."""
        return self._answer(step, Result.SUCCEEDED, outcome)

    def declines(self, outcome: Message | str, *, step: str | None = None) -> Self:
        """Let it be declined: with the handler's outcome, or for a reason in words."""
        return self._answer(step, Result.DECLINED, Refused(reason=outcome) if isinstance(outcome, str) else outcome)

    def fails(self, reason: str = "out of order", *, step: str | None = None) -> Self:
        """Let it fail for technical reasons, after all its tries."""
        return self._answer(step, Result.FAILED, Failed(code="failed", reason=reason, attempts=1))

    def is_granted(self) -> Self:
        """Let it be first in the line for its business key, and begin."""
        self.take(Granted(self.now))
        return self

    def passes(self, seconds: float) -> Self:
        """Let time pass, and what is due be decided on."""
        self.now += timedelta(seconds=seconds)
        self.take(Elapsed(self.now))
        return self

    def gives_no_answer(self) -> Self:
        """Let time pass until the earliest deadline.

        Raises:
            AssertionError: it waits for nothing.
        """
        due = (
            [at.due_at for at in self.instance.steps.values() if at.due_at is not None] if self.status.in_flight else []
        )
        due += [self.instance.due_at] if self.instance.due_at is not None else []
        if not due:
            raise AssertionError(f"the saga is {self.status} and waits for nothing")
        return self.passes(max(0.0, (min(due) - self.now).total_seconds()))

    def receives(self, event: Event) -> Self:
        """Let a business event happen that it waits for.

        Raises:
            AssertionError: no part of its flow waits for such an event, or for one with these values.
        """
        for wait in self.definition.waits:
            if isinstance(event, wait.events) and wait.values_of(event, of_event=True) == wait.values_of(
                self.saga, of_event=False
            ):
                self.take(Happened(wait.name, event, self._message_id(), self.now))
                return self
        raise AssertionError(f"no part of {self.definition.name} waits for {event!r}")

    def is_recalled(self, attempt: int = 1) -> Self:
        """Let the parent ask for what it has done to be undone."""
        self.take(Recalled(attempt, self._message_id(), self.now))
        return self

    def replies(
        self, step: str, direction: Direction, result: Result, outcome: Message | None = None, *, attempt: int = 1
    ) -> Self:
        """Deliver any reply: one that comes late, twice, or that nobody waits for."""
        detail = "" if result is Result.SUCCEEDED else describe(outcome)
        self.take(Replied(step, direction, attempt, result, outcome, detail, self._message_id(), self.now))
        return self

    def acts(
        self,
        verb: Verb,
        step: str | None = None,
        *,
        until: datetime | None = None,
        revision: int | None = None,
        resolution: Resolution | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Self:
        """Let an operator step in.

        Raises:
            NotPossibleError: that makes no sense where the saga stands.
        """
        self.take(Acted(verb, "ada", "a test", self.now, step, until, revision, resolution, data))
        return self

    def migrates(self, to: type[Saga]) -> Self:
        """Take the saga over into another version, as `coordinator sagas migrate` does; it goes on as one of that.

        Raises:
            NotTransferableError: it must stay as it is.
        """
        decision = transfer(self.definition, to.definition, self.instance, by="ada", why="a test", now=self.now)
        self.definition = to.definition
        self._since = len(self.decisions)
        self.decisions.append(decision)
        return self

    def take(self, given: Input) -> Decision | None:
        """Decide on any input, and on what is due at once after it; return the first decision."""
        decision = decide(self.definition, self.instance if self.decisions else None, given)
        if decision is None:
            return None
        self._since = len(self.decisions)
        self.decisions.append(decision)
        while self.instance.due_at is not None and self.instance.due_at <= self.now:
            following = decide(self.definition, self.instance, Elapsed(self.now))
            if following is None:
                break
            self.decisions.append(following)
        return decision

    def _answer(self, step: str | None, result: Result, outcome: Message | None) -> Self:
        request = self._outstanding(step)
        return self.replies(request.step, request.direction, result, outcome, attempt=request.attempt)

    def _outstanding(self, step: str | None) -> Request:
        """Return the newest request whose answer is awaited."""
        awaited = {
            request.step: request
            for decision in self.decisions
            for request in decision.requests
            if (at := self.instance.steps.get(request.step)) and at.awaits(request.direction, request.attempt)
        }
        if step is None and len(awaited) == 1:
            return next(iter(awaited.values()))
        if step not in awaited:
            names = ", ".join(awaited) or "nothing"
            raise AssertionError(f"the saga is {self.status} and waits for {names}" + (f", not {step}" if step else ""))
        return awaited[step]

    def _message_id(self) -> str:
        self._messages += 1
        return f"m-{self._messages}"
