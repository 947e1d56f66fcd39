"""The chain of hashes over a saga's history: no row can be changed, removed or moved without breaking it.

The hash of a row is SHA-256 over text: the hash of the row before in hex (nothing for the first), and each column but
the hash itself, in the order of `COLUMNS`, as its length in bytes, a colon, and its text; `-` stands for null. An id is
written in hex, a time as microseconds since 1970, JSON as it is stored. The instance keeps the hash of its last row.
"""

from collections.abc import Sequence
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


def history_row(saga_id: UUID, revision: int, e: HistoryEntry, *, given: str | None, head: bytes) -> HistoryRow:
    """Return the row of a transition: the values of `COLUMNS` and the hash.

    Args:
        saga_id: the instance.
        revision: its number of this transition.
        e: what happened.
        given: what was decided on, as JSON text.
        head: the hash of the row before.
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
        to_json(e.sent).decode(),
    )
    return (*row, seal(head, row))


def seal(head: bytes, row: Sequence[Any]) -> bytes:
    """Return the hash of a row, given the one before it and its values of `COLUMNS`."""
    saga_id, revision, kind, at, *rest = row
    texts = [head.hex()]
    for value in (saga_id.hex, revision, kind, (at - _EPOCH) // _MICROSECOND, *rest):
        if value is None:
            texts.append("-")
        else:
            text = str(value)
            texts.append(f"{len(text) if text.isascii() else len(_bytes(text))}:{text}")
    return sha256(_bytes("".join(texts))).digest()


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # which no database takes: it says so better than we could
