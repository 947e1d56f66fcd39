"""The chain of hashes over a saga's history: no row can be changed, removed or moved without breaking it.

The hash of a row is SHA-256 over a JSON array of strings and nulls, without spaces: the hash of the row before in hex
(empty for the first), and each column but the hash itself, in the order of `COLUMNS`. An id is written in hex, a time
as microseconds since 1970, JSON as it is stored; of a string only what must be is escaped. The instance keeps the
hash of its last row.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID

from pydantic_core import to_json

from coordinator.decision import HistoryEntry

COLUMNS = (
    "saga_id",
    "revision",
    "kind",
    "at",
    "status",
    "step",
    "direction",
    "attempt",
    "result",
    "message_id",
    "reason",
    "actor",
    "why",
    "input",
    "change",
    "sent",
)
GENESIS = b""

HistoryRow = tuple[Any, ...]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def history_row(
    saga_id: UUID,
    revision: int,
    e: HistoryEntry,
    *,
    given: str | None,
    head: bytes,
    sent: Sequence[Mapping[str, Any]] | None = None,
) -> HistoryRow:
    """Return the row of a transition: the values of `COLUMNS` and the hash.

    Args:
        saga_id: the instance.
        revision: its number of this transition.
        e: what happened.
        given: what was decided on, as JSON text.
        head: the hash of the row before.
        sent: what was sent, where more is known of it than the decision says.
    """
    row = (
        saga_id,
        revision,
        e.kind,
        e.at,
        e.status.value,
        e.step,
        e.direction and e.direction.value,
        e.attempt,
        e.result and e.result.value,
        e.message_id,
        e.reason,
        e.actor,
        e.why,
        given,
        to_json(e.change).decode(),
        to_json(e.sent if sent is None else sent).decode(),
    )
    return (*row, seal(head, row))


def seal(head: bytes, row: Sequence[Any]) -> bytes:
    """Return the hash of a row, given the one before it and its values of `COLUMNS`."""
    saga_id, revision, kind, at, *rest = row
    return digest(head, saga_id.hex, revision, kind, (at - _EPOCH) // _MICROSECOND, *rest)


def digest(head: bytes, *columns: str | int | None) -> bytes:
    """Return the hash of a row whose values are plain already."""
    texts = [each if each is None or isinstance(each, str) else str(each) for each in columns]
    return sha256(to_json([head.hex(), *texts])).digest()
