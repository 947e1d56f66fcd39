"""One run of a saga, as data."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from events.envelope import Direction, Result


class Status(StrEnum):
    """Where a saga instance stands."""

    WAITING = "waiting"  # for a business key that another saga holds; it has begun nothing
    RUNNING = "running"
    COMPENSATING = "compensating"
    COMPLETED = "completed"
    COMPENSATED = "compensated"
    NEEDS_ATTENTION = "needs_attention"
    ARCHIVED = "archived"  # only its key is left here

    @property
    def in_flight(self) -> bool:
        """Whether its steps are under way: the coordinator is going to do more without being asked."""
        return self in (Status.RUNNING, Status.COMPENSATING)

    @property
    def ended(self) -> bool:
        """Whether nothing is left to be done, by nobody."""
        return self in (Status.COMPLETED, Status.COMPENSATED, Status.ARCHIVED)


UNFINISHED = tuple(status for status in Status if not status.ended)


class StepStatus(StrEnum):
    """Where a step stands. A step that was not begun has no state at all."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    DECLINED = "declined"
    UNKNOWN = "unknown"  # given up on: it may or may not have happened, and counts as done when undoing
    RETRYING = "retrying"  # there is no way back, and it has failed: it waits for its next attempt
    UNDOING = "undoing"
    UNDONE = "undone"
    UNDO_RETRYING = "undo_retrying"  # its compensation has failed, and waits for its next attempt
    UNDO_FAILED = "undo_failed"
    TAKEN = "taken"  # of a condition: it held
    NOT_TAKEN = "not_taken"
    WAITING = "waiting"  # for an event of the business, or for time to pass
    EXPIRED = "expired"  # no event came in time, and the saga has gone on without it
    CALLED_OFF = "called_off"  # the saga has turned back, and waits no more
    LISTED = "listed"  # one item of several, whose turn has not come

    @property
    def outstanding(self) -> bool:
        """Whether a command is on its way and its answer is awaited."""
        return self in (StepStatus.RUNNING, StepStatus.UNDOING)

    @property
    def pending(self) -> bool:
        """Whether an answer is awaited, or an event, or a time."""
        return self.outstanding or self in (StepStatus.RETRYING, StepStatus.UNDO_RETRYING, StepStatus.WAITING)

    @property
    def done(self) -> bool:
        """Whether the flow goes on after it."""
        return self in (StepStatus.SUCCEEDED, StepStatus.EXPIRED)

    @property
    def to_undo(self) -> bool:
        """Whether the step counts as done when undoing."""
        return self in (StepStatus.SUCCEEDED, StepStatus.UNKNOWN)


def item_name(step: str, number: int) -> str:
    """Return the name of the state of one item of a step."""
    return f"{step}[{number}]"


def step_and_item(name: str) -> tuple[str, int | None]:
    """Return the step that a state's name says, and the number of the item if it is one's."""
    step, bracket, number = name.partition("[")
    return (step, int(number[:-1])) if bracket and number[:-1].isdecimal() else (name, None)


@dataclass(frozen=True, slots=True)
class Fan:
    """How far a step has come that is taken for each of several items.

    Attributes:
        total: how many items there are.
        begun: how many were begun; they begin in order.
        pending: how many of them are under way, forth or back.
        failed: how many have failed: where the others go on, whether they were undone or not.
        unseen: when undoing, how many of those that were begun were not looked at yet; they are, from the last one on.
        stuck: how many could not be undone.
    """

    total: int
    begun: int = 0
    pending: int = 0
    failed: int = 0
    unseen: int | None = None
    stuck: int = 0

    def to_json(self) -> dict[str, int]:
        """Return plain data for the store."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True)
class StepState:
    """Where a step of an instance stands.

    Attributes:
        status: see `StepStatus`.
        attempt: which attempt of the step this is, from 1.
        undo_attempt: which attempt of its compensation; 0 before the first.
        sends: how often the outstanding command was sent.
        due_at: when its answer is given up on, or its next attempt begins.
        answer: what was heard of a step that is given up on or undone; None if nothing was.
        command: the type of the command, where a compensation will want to name it.
        made_of: the saga's state that the outstanding command was made of, where it has changed since.
        before_turn: of a step for several items that goes back while some are under way: the state that what they were
            sent before was made of.
        alone: of one of these: its compensation was sent before its step has turned back.
        fan: of a step that is taken for each of several items: how far it has come.
        item: of one of these: the item.
    """

    status: StepStatus
    attempt: int = 1
    undo_attempt: int = 0
    sends: int = 0
    due_at: datetime | None = None
    answer: Result | None = None
    command: str | None = None
    made_of: dict[str, Any] | None = None
    before_turn: dict[str, Any] | None = None
    alone: bool = False
    fan: Fan | None = None
    item: Any = None

    def awaits(self, direction: Direction, attempt: int) -> bool:
        """Say whether this is the answer that is outstanding."""
        if direction is Direction.DO:
            return self.status is StepStatus.RUNNING and attempt == self.attempt
        return self.status is StepStatus.UNDOING and attempt == self.undo_attempt

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the store."""
        document: dict[str, Any] = {"status": self.status.value, "attempt": self.attempt}
        if self.undo_attempt:
            document["undo_attempt"] = self.undo_attempt
        if self.sends:
            document["sends"] = self.sends
        if self.due_at:
            document["due_at"] = self.due_at.isoformat()
        if self.answer:
            document["answer"] = self.answer.value
        if self.command:
            document["command"] = self.command
        if self.alone:
            document["alone"] = True
        if self.fan is not None:
            document["fan"] = self.fan.to_json()
        for name in ("made_of", "before_turn", "item"):
            if (value := getattr(self, name)) is not None:
                document[name] = value
        return document

    def to_history(self) -> dict[str, Any]:
        """Return plain data for the history, which tells already what state a command was made of."""
        document = self.to_json()
        document.pop("made_of", None)
        document.pop("before_turn", None)
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "StepState":
        """Read what `to_json` returned."""
        due_at, answer = document.get("due_at"), document.get("answer")
        return cls(
            StepStatus(document["status"]),
            document["attempt"],
            document.get("undo_attempt", 0),
            document.get("sends", 0),
            datetime.fromisoformat(due_at) if due_at else None,
            Result(answer) if answer else None,
            document.get("command"),
            document.get("made_of"),
            document.get("before_turn"),
            document.get("alone", False),
            Fan(**document["fan"]) if "fan" in document else None,
            document.get("item"),
        )


@dataclass(frozen=True, slots=True)
class Origin:
    """The command that a child saga was started by, and its parent's step, which waits for the answer.

    Attributes:
        saga_id: the parent.
        step: its step.
        attempt: its attempt.
        reply_to: where the answer goes.
        undo_attempt: the attempt of the compensation that waits for an answer; 0 if none does.
    """

    saga_id: UUID
    step: str
    attempt: int
    reply_to: str
    undo_attempt: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the store."""
        return {
            "saga_id": str(self.saga_id),
            "step": self.step,
            "attempt": self.attempt,
            "reply_to": self.reply_to,
            "undo_attempt": self.undo_attempt,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Origin":
        """Read what `to_json` returned."""
        return cls(**{**document, "saga_id": UUID(document["saga_id"])})


@dataclass(frozen=True, slots=True)
class Instance:
    """One run of a saga.

    Attributes:
        state: the saga's fields as plain JSON data.
        steps: the steps that were begun, by name; `ship[3]` is a step's item of that number, if it is loaded.
        revision: counts the transitions, from 1; every write names the one it follows.
        due_at: the earliest deadline, its own or of its steps.
        reason: why it is undone or needs attention.
        traceparent: the span that the whole saga belongs to.
        deadline: when the saga as a whole turns back, unless a pivot has begun; None for never.
        head: the hash of the last row of its history; empty before the first.
        turned_back: whether it is undone, or was.
        origin: the command that a child saga answers.
        announced: how it had ended when it published its event: one that is woken by late news does not say it twice.
    """

    id: UUID
    saga: str
    version: int
    key: str
    status: Status
    state: dict[str, Any]
    steps: dict[str, StepState] = field(default_factory=dict)
    revision: int = 0
    due_at: datetime | None = None
    reason: str | None = None
    traceparent: str | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    deadline: datetime | None = None
    head: bytes = b""
    turned_back: bool = False
    origin: Origin | None = None
    announced: Status | None = None

    def wants_more_by(self, now: datetime) -> bool:
        """Say whether a step for several items asks for its next ones."""
        if self.due_at is None or self.due_at > now:
            return False
        return any(at.fan is not None and at.due_at is not None for at in self.steps.values())
