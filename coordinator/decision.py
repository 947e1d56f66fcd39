"""What goes into a decision and what comes out of it: inputs, requests, announcements, history. Only data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from coordinator.instance import Instance, Origin, Status
from events.envelope import Direction, Result
from events.message import Command, Event, Message


@dataclass(frozen=True, slots=True)
class Started:
    """What starts a saga has arrived; `saga_id` is the id for the instance.

    Attributes:
        event: the start event, or the command of the saga whose child this is; that one is the `origin`.
    """

    saga_id: UUID
    event: Message
    message_id: str
    now: datetime
    traceparent: str | None = None
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Replied:
    """The outcome of a command has arrived. `outcome` is its message where the saga wants to see it."""

    step: str
    direction: Direction
    attempt: int
    result: Result
    outcome: Message | None
    detail: str
    message_id: str
    now: datetime


@dataclass(frozen=True, slots=True)
class Happened:
    """A business event has arrived that the saga waits for in `step`, or did, or will."""

    step: str
    event: Event
    message_id: str
    now: datetime


@dataclass(frozen=True, slots=True)
class Asked:
    """The parent asks a child saga once more for what it was started for: again, or as a new attempt."""

    origin: Origin
    message_id: str
    now: datetime


@dataclass(frozen=True, slots=True)
class Recalled:
    """The parent asks a child saga to undo what it did."""

    attempt: int
    message_id: str
    now: datetime


@dataclass(frozen=True, slots=True)
class Elapsed:
    """Time has passed: deadlines up to `now` are due."""

    now: datetime


@dataclass(frozen=True, slots=True)
class Granted:
    """The saga is first in the line for its business key: it may begin."""

    now: datetime


class Verb(StrEnum):
    """What an operator can do to a saga."""

    RETRY = "retry"
    SKIP = "skip"
    COMPENSATE = "compensate"
    CANCEL = "cancel"
    RESOLVE = "resolve"
    MOVE_DEADLINE = "move_deadline"
    CANCEL_DEADLINE = "cancel_deadline"


class Resolution(StrEnum):
    """How a step has really ended, as an operator has found out."""

    SUCCEEDED = "succeeded"
    DECLINED = "declined"  # it was not done, and will not be
    FAILED = "failed"  # its answer will not come, and nobody knows whether it was done
    UNDONE = "undone"


@dataclass(frozen=True, slots=True)
class Acted:
    """An operator's act.

    Attributes:
        verb: what is to be done.
        by: who does it.
        why: the reason.
        now: when.
        step: the step that is meant, for a verb that needs one; of a deadline, None is the saga's own.
        until: the new deadline, to move one.
        revision: the revision that was looked at; the act is refused if the saga has moved on since.
        resolution: how a step has ended, to resolve it.
        data: what its handler would have said, as JSON data.
    """

    verb: Verb
    by: str
    why: str
    now: datetime
    step: str | None = None
    until: datetime | None = None
    revision: int | None = None
    resolution: Resolution | None = None
    data: Mapping[str, Any] | None = None


Input = Started | Replied | Happened | Asked | Recalled | Elapsed | Granted | Acted


@dataclass(frozen=True, slots=True)
class Request:
    """A command to send for a step. The same request, decided on again, has the same id.

    A compensation names the command that it undoes, by id and type.
    """

    id: UUID
    command: Command
    step: str
    direction: Direction
    attempt: int
    undoes: UUID | None = None
    undoes_type: str | None = None


@dataclass(frozen=True, slots=True)
class Announcement:
    """An event to publish."""

    id: UUID
    event: Event


@dataclass(frozen=True, slots=True)
class Answer:
    """What a child saga tells its parent. The same answer, decided on again, has the same id."""

    id: UUID
    origin: Origin
    direction: Direction
    attempt: int
    result: Result
    message: Message


@dataclass(frozen=True, slots=True)
class Standing:
    """A part of a flow that waits for an event with these values, as `Wait.values_of` gives them."""

    step: str
    values: str


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """What happened: one row for each revision of an instance. `actor` and `why` are an operator's."""

    kind: str
    at: datetime
    status: Status
    step: str | None = None
    direction: Direction | None = None
    attempt: int | None = None
    result: Result | None = None
    message_id: str | None = None
    reason: str | None = None
    change: dict[str, Any] = field(default_factory=dict)
    sent: tuple[dict[str, Any], ...] = ()
    actor: str | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """All that follows from an input.

    Attributes:
        waits: what it waits for from now on.
        over: the parts that wait no more.
        answers: what a child saga tells its parent.
        lock: the business key that a new instance waits for.
    """

    instance: Instance
    requests: tuple[Request, ...]
    announcements: tuple[Announcement, ...]
    entry: HistoryEntry
    waits: tuple[Standing, ...] = ()
    over: tuple[str, ...] = ()
    answers: tuple[Answer, ...] = ()
    lock: str | None = None
