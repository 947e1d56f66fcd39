"""The approval of documents: drafted, submitted, approved by somebody else, or not."""

from coordinator.lifecycles import Act, Due, Lifecycle, deadlines, transition
from events.catalog.documents import (
    DocumentApprovalOverdue,
    DocumentApproved,
    DocumentChangesRequested,
    DocumentRejected,
    DocumentSubmitted,
)
from events.catalog.values import Name

_DAY = 86_400.0
_AUTHOR, _APPROVER, _HEAD = "author", "approver", "head_of_department"


class DocumentApproval(Lifecycle, name="document", version=1):
    """An author drafts and submits, somebody else approves. What is rejected becomes a draft, and is reviewed anew."""

    document_id: str
    author: str
    title: Name
    digest: str = ""

    @transition(to="draft", roles=_AUTHOR, by="author")
    def create(self, _: Act) -> None:
        """Begin a document; its author does."""

    @transition("draft", "changes_requested", to="draft", roles=_AUTHOR, edits=("title", "digest"))
    def revise(self, _: Act) -> None:
        """Change it."""

    @transition("draft", "changes_requested", to="pending_approval", roles=_AUTHOR)
    def submit(self, _: Act) -> DocumentSubmitted:
        """Ask for its approval."""
        return DocumentSubmitted(document_id=self.document_id, title=self.title, author=self.author)

    @submit.guard
    def is_complete(self) -> bool | str:
        return bool(self.digest) or "the digest of its content is missing: nobody could tell what was approved"

    @transition("pending_approval", to="approved", roles=_APPROVER, four_eyes=("author", "revise", "submit"))
    def approve(self, act: Act) -> DocumentApproved:
        """Approve it; nobody approves what he has written, changed or submitted."""
        return DocumentApproved(document_id=self.document_id, digest=self.digest, approved_by=str(act.by))

    @transition("pending_approval", to="rejected", roles=_APPROVER, comment=True)
    def reject(self, act: Act) -> DocumentRejected:
        """Reject it, and say why."""
        return DocumentRejected(document_id=self.document_id, rejected_by=str(act.by), reason=act.comment)

    @transition("pending_approval", to="changes_requested", roles=_APPROVER, comment=True)
    def request_changes(self, act: Act) -> DocumentChangesRequested:
        """Give it back, and say what is to be changed."""
        return DocumentChangesRequested(document_id=self.document_id, requested_by=str(act.by), reason=act.comment)

    @transition("rejected", to="draft", roles=_AUTHOR)
    def reopen(self, _: Act) -> None:
        """Begin anew with what was rejected."""

    @deadlines("pending_approval", remind_after=_DAY, every=_DAY, escalate_after=3 * _DAY, escalate_to=_HEAD)
    def overdue(self, due: Due) -> DocumentApprovalOverdue:
        """Remind those who may approve; after three days the head of department may, too."""
        return DocumentApprovalOverdue(
            document_id=self.document_id,
            title=self.title,
            waiting_since=due.entered_at,
            reminders=due.reminders,
            escalated_to=due.escalated_to,
        )
