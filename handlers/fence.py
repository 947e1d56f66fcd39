"""The fence: a compensation that comes before its command has nothing to undo, and bars the command from running.

Messages overtake each other, so a compensation may arrive first. It then succeeds without running, and leaves a
mark in the inbox in the place of the command, which is refused when it comes. (Seata calls this empty rollback and
anti-suspension: "Seata TCC mode", section "TCC Fence".) It works where command and compensation are handled on one
database, so only for commands that the same application handles.
"""

from collections.abc import Mapping
from uuid import UUID

from events.envelope import Direction, Envelope
from handlers.inbox import Recorded

BARRED = b""  # stands where a handled command has its reply


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

    def has_nothing_to_undo(self, envelope: Envelope, recorded: Mapping[UUID, Recorded]) -> bool:
        """Say whether the command that `envelope` undoes has not been executed."""
        command = self.undone_by(envelope)
        return command is not None and (command not in recorded or is_barred(recorded[command]))


def is_barred(entry: Recorded) -> bool:
    """Say whether a compensation stands in the place of the command."""
    return entry.reply == BARRED
