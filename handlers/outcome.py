"""What comes of a message, before it is committed."""

from dataclasses import dataclass, field
from enum import Enum
from uuid import UUID

from events.dead_letters import DeadLetter
from events.envelope import Envelope, Result
from events.intake import Item
from events.outbox import Outbound
from handlers.retries import Waiting


class Progress(Enum):
    """How far an outcome has come."""

    PENDING = "to be committed with others"
    COMMITTED = "committed with the handler's own work"
    LOST = "somebody else has handled the message meanwhile"


@dataclass(slots=True)
class Outcome:
    """What came of one message, ready to be committed.

    Attributes:
        item: the message.
        envelope: of a message that was in work; None for one that needed none.
        result: what its saga is told.
        messages: what it causes, the reply included.
        reply: what a duplicate is answered.
        dead: its dead letter, if it was given up on.
        again: its row in the table of those that are tried again; it is not handled yet.
        bars: the key of a command that must not run any more, and has not been tried.
        doubts: the key of a command that must not run any more, and may have been done.
        progress: how far this has come.
    """

    item: Item
    envelope: Envelope | None
    result: Result
    messages: list[Outbound] = field(default_factory=list)
    reply: Outbound | None = None
    dead: DeadLetter | None = None
    again: Waiting | None = None
    bars: UUID | None = None
    doubts: UUID | None = None
    progress: Progress = Progress.PENDING

    @property
    def handled(self) -> Envelope | None:
        """The envelope of a message that is to be recorded as handled."""
        return self.envelope if self.again is None else None
