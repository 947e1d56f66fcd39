"""The inbox: which messages a consumer has handled, and what it replied."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from events.bulk import Bulk, Lookup
from events.database import reader
from events.envelope import Envelope
from events.errors import StaleRowError
from events.message import Command
from handlers.definition import Handler
from handlers.tables import inbox, retry

_known = Lookup(inbox, "message_key", "consumer", "reply", "reply_to", "content", key="message_key", also=retry)
_insert = Bulk(inbox, "message_key", "consumer", "reply", "reply_to", "content", "handled_at")


@dataclass(frozen=True, slots=True)
class Recorded:
    """A handled message, the encoded reply it was given, if it was given one, and the digest of its content."""

    key: UUID
    consumer: str
    reply: bytes | None
    reply_to: str | None
    content: bytes | None = None

    def contradicts(self, envelope: Envelope) -> bool:
        """Whether `envelope`, which has this id, says something else."""
        return self.content is not None and self.content != envelope.content


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of some messages.

    Attributes:
        recorded: those that are handled.
        waiting: those that wait to be tried again by this consumer.
        tried: those that wait to be tried again by any.
    """

    recorded: Mapping[UUID, Recorded]
    waiting: Mapping[UUID, Recorded]
    tried: frozenset[UUID]


NOTHING = Known({}, {}, frozenset())
_replace = Bulk(inbox, "message_key", "reply", "reply_to", "content")
OF_SAGAS = "saga"


class Inbox:
    """The inbox of one consumer.

    A message is recorded for each of its consumers: a foreign client may well give one id to messages of several
    types. A saga's command has an id of its own and a single receiver, and is recorded under `OF_SAGAS`, so that
    the handler of its compensation finds it, and can stand in its place.
    """

    def __init__(self, engine: AsyncEngine, handler: Handler) -> None:
        self._reader = reader(engine)
        self._name = handler.name
        self._commands = issubclass(handler.message, Command)

    def consumer_of(self, envelope: Envelope) -> str:
        """Return under which name a message is recorded."""
        return OF_SAGAS if self._commands and envelope.saga is not None else self._name

    async def find(self, keys: Sequence[UUID]) -> Known:
        """Return what is known of `keys`, outside any transaction."""
        async with self._reader.connect() as connection:
            rows = await _known.find(connection, keys)
        recorded, waiting, tried = {}, {}, set()
        for *found, waits in rows:
            entry = Recorded(*found)
            if waits:
                tried.add(entry.key)
            if waits and entry.consumer == self._name:
                waiting[entry.key] = entry
            elif not waits and (entry.consumer == self._name or (self._commands and entry.consumer == OF_SAGAS)):
                recorded[entry.key] = entry
        return Known(recorded, waiting, frozenset(tried))

    async def record_new(self, connection: AsyncConnection, handled: Sequence[Recorded], now: datetime) -> None:
        """Record messages that nobody is expected to have recorded; a conflict is an error."""
        await _insert.insert(connection, self._rows(handled, now))

    async def record(self, connection: AsyncConnection, handled: Sequence[Recorded], now: datetime) -> set[UUID]:
        """Record messages in the open transaction; return the keys of those that nobody had recorded before.

        Who loses the race for a key waits here for the winner's commit and then finds the key missing in the
        answer: its own work must not be committed.
        """
        return set(await _insert.insert_new(connection, self._rows(handled, now), key=("message_key", "consumer")))

    async def take_over(
        self, connection: AsyncConnection, handled: Sequence[Recorded], marks: Sequence[bytes]
    ) -> set[UUID]:
        """Record messages in whose place only one of `marks` stands; return their keys."""
        taken = set()
        for entry in sorted(handled, key=lambda entry: entry.key.int):
            for mark in marks:
                with suppress(StaleRowError):
                    async with connection.begin_nested():
                        row = (entry.key, entry.reply, entry.reply_to, entry.content)
                        await _replace.update(connection, [row], key="message_key", expected=("reply", [mark]))
                    taken.add(entry.key)
                    break
        return taken

    def _rows(self, handled: Sequence[Recorded], now: datetime) -> list[tuple[object, ...]]:
        """Return the rows in one order for everybody, so that two batches cannot deadlock."""
        ordered = sorted(handled, key=lambda entry: entry.key.int)
        return [(entry.key, entry.consumer, entry.reply, entry.reply_to, entry.content, now) for entry in ordered]
