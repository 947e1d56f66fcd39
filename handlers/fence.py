"""The fence: a compensation that comes before its command has nothing to undo, and bars the command from running.

Messages overtake each other, so a compensation may arrive first. It then succeeds without running, and leaves a
mark in the inbox in the place of the command, which is refused when it comes. (Seata calls this empty rollback and
anti-suspension: "Seata TCC mode", section "TCC Fence".) It works where command and compensation are handled on one
database, so only for commands that the same application handles.

A command that has been tried is another matter: it may have had its effect although every try has failed. If it waits
to be tried again its compensation runs, and it is barred. If its compensation was there while it was being tried for
the first time, it says so when it comes back: it has failed, not been declined, and its saga undoes it once more.
"""

from uuid import UUID

from events.envelope import Direction, Envelope
from handlers.inbox import Known, Recorded

# What stands where a handled command has its reply, once it must not run any more
UNTRIED = b""  # nobody knows of a try
TRIED = b"tried"  # it may have been done
MARKS = (UNTRIED, TRIED)


class Fence:
    """Knows which compensations can be judged here.

    Args:
        commands: the types of all commands that the application handles.
    """

    def __init__(self, commands: frozenset[str]) -> None:
        self._commands = commands

    def undone_by(self, envelope: Envelope) -> UUID | None:
        """Return the key of the command that `envelope` undoes, if it is one that would be recorded here."""
        saga = envelope.saga
        if saga is None or saga.direction is not Direction.UNDO or saga.undoes_type not in self._commands:
            return None
        return saga.undoes

    def has_nothing_to_undo(self, envelope: Envelope, known: Known) -> bool:
        """Say whether nobody knows of a try of the command that `envelope` undoes."""
        command = self.undone_by(envelope)
        if command is None or command in known.tried:
            return False
        return command not in known.recorded or known.recorded[command].reply == UNTRIED

    def doubted_by(self, envelope: Envelope, known: Known) -> UUID | None:
        """Return the key of the command that `envelope` undoes if it has been tried, and waits to be tried again."""
        command = self.undone_by(envelope)
        return command if command in known.tried else None


def is_barred(entry: Recorded) -> bool:
    """Say whether a compensation stands in the place of the command."""
    return entry.reply in MARKS
