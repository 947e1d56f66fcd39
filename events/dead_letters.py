"""Messages that were given up on, kept whole with the reason."""

import hashlib
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from events.bulk import Bulk, Lookup, Row
from events.codec import Readable
from events.ids import Ids
from events.intake import Item
from events.tables import dead_letter, dead_letter_change

_MAX_DETAIL = 8000
_MAX_HEAD = 2000  # of these; the rest is the end, where a stack names the error
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
_tries = Lookup(dead_letter, "id", "attempts", "consumer", "reason", "detail", "error_type", "dead_at", key="id")
_died = Bulk(dead_letter_change, "id", "dead_letter_id", "act", "changed_at", "changed_by", "reason")
DIED = "died"  # what the record says of an earlier death
COORDINATOR = "coordinator"  # stands as the consumer of what sagas wait for, and start on
BUS = "bus"  # stands as the consumer of what no queue took
CONFLICT = "conflict"  # the reason of a letter with the id of a message that says something else
DEAD = "dead"  # the status of a letter that nobody has settled
# What RabbitMQ says of its own dead letters ("Dead Letter Exchanges", x-first-death-reason): no handler gave them up,
# and one may well have handled them.
BROKER_REASONS = frozenset({"delivery_limit", "expired", "maxlen", "rejected"})
_frame = re.compile(r'^[ \t|+-]*File "([^"\n]*)", line \d+, in (\S+)', re.MULTILINE)
_runtime = re.compile(r"(^|/)(handlers/(execution|runner)\.py|tenacity/.*)$")  # differs from try to try
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
        places = ((file.replace("\\", "/"), function) for file, function in _frame.findall(self.detail))
        frames = [f"{_short(file)} {function}" for file, function in places if not _runtime.search(file)]
        cause = "\n".join(dict.fromkeys(frames)) or _particular.sub("?", self.detail)
        what = "\n".join((self.consumer, self.reason, self.error_type or "", cause))
        return hashlib.sha256(what.encode(errors="backslashreplace")).hexdigest()[:12]


async def bury(connection: AsyncConnection, letters: Sequence[DeadLetter], *, ids: Ids, now: datetime) -> None:
    """Store `letters` in the open transaction; the bytes stay as they came. May stand in a block of `together`.

    Tries of one that was replayed in vain are added to those before, and of what it had died before is kept in its
    record. If its row is gone it becomes a new letter.
    """
    reopened = [letter.reopens for letter in letters if letter.reopens is not None]
    found = await _tries.find(connection, reopened) if reopened else []
    tried: dict[UUID | None, int] = {row[0]: row[1] for row in found}
    again, fresh = [], []
    for letter in letters:
        if letter.reopens in tried:
            again.append(_reopened(letter, tried[letter.reopens], now))
        else:
            fresh.append(_row(letter, ids.new(), now))
    await _reopen.update(connection, again, key="id")
    await _died.insert(connection, [_death(row, ids.new()) for row in found])
    await _insert.insert(connection, fresh)


def _death(row: Row, id: UUID) -> tuple[Any, ...]:
    letter, _, consumer, reason, detail, error_type, dead_at = row
    return id, letter, DIED, dead_at, consumer, f"{reason}: {summary_of(detail, error_type)}"


def _reopened(letter: DeadLetter, tried: int, now: datetime) -> tuple[Any, ...]:
    return (
        letter.reopens,
        letter.reason,
        _detail(letter.detail),
        tried + letter.attempts,
        now,
        letter.error_type,
        letter.fingerprint,
        DEAD,
        None,
        None,
        None,
    )


def _row(letter: DeadLetter, id: UUID, now: datetime) -> tuple[Any, ...]:
    part, delivery = letter.item.part, letter.item.delivery
    envelope = part.envelope if isinstance(part, Readable) else None
    return (
        id,
        letter.consumer,
        letter.reason,
        _detail(letter.detail),
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


def _detail(text: str) -> str:
    """Return `text` as it is stored: both ends of what is too long, since a stack begins with us and ends with why."""
    text = storable(text)
    if len(text) <= _MAX_DETAIL:
        return text
    gap = "\n...\n"
    return text[:_MAX_HEAD] + gap + text[_MAX_HEAD + len(gap) - _MAX_DETAIL :]


def _short(file: str) -> str:
    """Return the end of a path: where the code is installed says nothing of a cause."""
    return "/".join(file.split("/")[-2:])


def summary_of(detail: str, error_type: str | None) -> str:
    """Return the first line of an error; of a detail that is no stack the last one."""
    lines = [line for line in reversed(detail.splitlines()) if line.strip()]
    errors = (line for line in lines if error_type and line.lstrip(" |+").startswith(error_type))
    return next(errors, lines[0] if lines else "")


def error_type_of(error: BaseException) -> str:
    """Return how the class of an error is called in a dead letter."""
    return f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")


def stack_of(error: BaseException) -> str:
    """Return an error with its causes and their stacks."""
    return "".join(traceback.format_exception(error))


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
