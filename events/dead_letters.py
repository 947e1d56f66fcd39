"""Messages that were given up on, kept whole with the reason."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from events.bulk import Bulk
from events.codec import Readable
from events.ids import Ids
from events.intake import Item
from events.tables import dead_letter

_MAX_DETAIL = 8000
_insert = Bulk(
    dead_letter,
    "id",
    "consumer",
    "reason",
    "detail",
    "body",
    "content_type",
    "headers",
    "message_id",
    "message_type",
    "saga_id",
    "traceparent",
    "attempts",
    "dead_at",
    "error_type",
    "first_at",
    "fingerprint",
    "status",
)
_reopen = Bulk(
    dead_letter,
    "id",
    "reason",
    "detail",
    "attempts",
    "dead_at",
    "error_type",
    "fingerprint",
    "status",
    "settled_at",
    "settled_by",
    "settled_why",
)
BUS = "bus"  # stands as the consumer of what no queue took
DEAD = "dead"  # the status of a letter that nobody has settled
_frame = re.compile(r'^\s*File "([^"]*)", line \d+, in (\S+)', re.MULTILINE)
_particular = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|0x[0-9a-f]+|\d+|'[^']*'|\"[^\"]*\"", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message, who gave it up, and why.

    Attributes:
        item: the message.
        consumer: the handler that gave it up, or who else did.
        reason: a code of `events.errors`.
        detail: for people: the error's text, or its stack.
        attempts: how often it was tried.
        error_type: the class of the error, if one was raised.
        first_at: when it was tried first.
        reopens: the letter that was replayed in vain: it is dead again, and keeps its place.
    """

    item: Item
    consumer: str
    reason: str
    detail: str
    attempts: int = 1
    error_type: str | None = None
    first_at: datetime | None = None
    reopens: UUID | None = None

    @property
    def fingerprint(self) -> str:
        """What letters have in common that died of the same cause: where it was raised, or what was said of it."""
        frames = _frame.findall(self.detail)
        cause = "\n".join(f"{file} {function}" for file, function in frames)
        cause = cause or _particular.sub("?", self.detail)
        what = "\n".join((self.consumer, self.reason, self.error_type or "", cause))
        return hashlib.sha256(what.encode(errors="backslashreplace")).hexdigest()[:12]


async def bury(connection: AsyncConnection, letters: Sequence[DeadLetter], *, ids: Ids, now: datetime) -> None:
    """Store `letters` in the open transaction; the bytes stay as they came. May stand in a block of `together`."""
    again = [
        (
            letter.reopens,
            letter.reason,
            storable(letter.detail)[:_MAX_DETAIL],
            letter.attempts,
            now,
            letter.error_type,
            letter.fingerprint,
            DEAD,
            None,
            None,
            None,
        )
        for letter in letters
        if letter.reopens is not None
    ]
    await _reopen.update(connection, again, key="id")
    rows = []
    for letter in letters:
        if letter.reopens is not None:
            continue
        part, delivery = letter.item.part, letter.item.delivery
        envelope = part.envelope if isinstance(part, Readable) else None
        rows.append(
            (
                ids.new(),
                letter.consumer,
                letter.reason,
                storable(letter.detail)[:_MAX_DETAIL],
                part.raw,
                delivery.content_type and storable(delivery.content_type),
                plain_headers(delivery.headers),
                envelope and envelope.id,
                envelope and envelope.type,
                envelope.saga.saga_id if envelope and envelope.saga else None,
                envelope and envelope.traceparent,
                letter.attempts,
                now,
                letter.error_type,
                letter.first_at or now,
                letter.fingerprint,
                DEAD,
            )
        )
    await _insert.insert(connection, rows)


def storable(text: str) -> str:
    """Return `text` without what PostgreSQL or UTF-8 cannot hold: NUL and lone surrogates are written as escapes."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\0")


def plain_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return AMQP headers as something that JSON and PostgreSQL can hold."""
    return {storable(name): _plain(value) for name, value in headers.items()}


def _plain(value: Any) -> Any:
    """Return an AMQP header value as something that JSON and PostgreSQL can hold."""
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace").replace("\0", "\\0")
    return storable(str(value))
