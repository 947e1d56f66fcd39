"""An approval that a saga waits for: what it asks for, and what the world is told."""

from datetime import datetime
from typing import Annotated

from pydantic import StringConstraints

from events.catalog.values import Name
from events.message import Command, Event

ApprovalName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,99}$")]
Key = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Subject = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Decider = Annotated[str, StringConstraints(min_length=1, max_length=500)]  # "dan for ann" where somebody stands in
Comment = Annotated[str, StringConstraints(max_length=4000)]


class RequestApproval(Command):
    """Ask for an approval. The requester cannot give it himself."""

    approval: ApprovalName
    key: Key
    subject: Subject
    requester: Name


class WithdrawApproval(Command):
    """Ask no more for an approval, or take it that it is not needed any more."""

    approval: ApprovalName
    key: Key


class ApprovalRequested(Event):
    """An approval is waited for."""

    approval: ApprovalName
    key: Key
    subject: Subject
    requester: Name
    role: str


class ApprovalOverdue(Event):
    """An approval has been waited for for long: a reminder or an escalation."""

    approval: ApprovalName
    key: Key
    subject: Subject
    waiting_since: datetime
    reminders: int
    escalated_to: str | None = None


class ApprovalWithdrawn(Event):
    """Nobody waits for an approval any more."""

    approval: ApprovalName
    key: Key


class ApprovalGranted(Event):
    """What was asked for is approved. Each kind of approval has its own below this: sagas wait for events by type."""

    key: Key
    decided_by: Decider
    comment: Comment


class ApprovalDenied(Event):
    """What was asked for is not approved, and why."""

    key: Key
    decided_by: Decider
    reason: Comment
