"""A document that is approved or not: what the world is told of it."""

from datetime import datetime
from typing import Annotated

from pydantic import StringConstraints

from events.catalog.values import Name
from events.message import Event

DocumentId = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
Decider = Annotated[str, StringConstraints(min_length=1, max_length=500)]  # "dan for ann" where somebody stands in
Comment = Annotated[str, StringConstraints(max_length=4000)]


class DocumentSubmitted(Event):
    """A document waits to be approved."""

    document_id: DocumentId
    title: Name
    author: Name


class DocumentApproved(Event):
    """A document is approved, in the form that has this digest."""

    document_id: DocumentId
    digest: str
    approved_by: Decider


class DocumentRejected(Event):
    """A document is rejected."""

    document_id: DocumentId
    rejected_by: Decider
    reason: Comment


class DocumentChangesRequested(Event):
    """A document may be approved once it is changed."""

    document_id: DocumentId
    requested_by: Decider
    reason: Comment


class DocumentApprovalOverdue(Event):
    """A document has waited for long: a reminder or an escalation."""

    document_id: DocumentId
    title: Name
    waiting_since: datetime
    reminders: int
    escalated_to: str | None = None
