"""What is done with dead letters, and the record of it: statements for the transactions of `DeadLetters`."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, not_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from events.bulk import Bulk
from events.dead_letters import COORDINATOR, storable
from events.envelope import Envelope
from events.errors import ConfigurationError
from events.ids import Ids
from events.tables import IS_SETTLED, dead_letter, dead_letter_change
from handlers.inbox import OF_SAGAS
from handlers.letters import Letter, replays_of
from handlers.tables import inbox, retry

_changes = Bulk(dead_letter_change, "id", "dead_letter_id", "act", "body", "changed_at", "changed_by", "reason")
_handled = Bulk(inbox, "message_key", "consumer", "reply", "reply_to", "content", "handled_at")
_is_awaited = select(retry.c.id).where(retry.c.dead_letter_id == dead_letter.c.id).exists()


class Act:
    """Something that somebody does with letters: who, why and when, once for all of them.

    Args:
        what: `replayed`, `discarded` or `edited`.
        by, why: who does it, and the reason.
        now: when.
        ids: names the entries of the record.

    Raises:
        ConfigurationError: it is not said who does it, or why.
    """

    def __init__(self, what: str, *, by: str, why: str, now: datetime, ids: Ids) -> None:
        refuse_silence(by, why)
        self._what = what
        self._by = storable(by)
        self._why = storable(why)
        self._now = now
        self._ids = ids

    async def record(
        self, connection: AsyncConnection, letters: Sequence[UUID], body: bytes | None = None, **values: Any
    ) -> None:
        """Write that it is done with `letters`, and set `values` in their rows; they must be locked."""
        if not letters:
            return
        settled = {"settled_at": self._now, "settled_by": self._by, "settled_why": self._why, **values}
        await connection.execute(dead_letter.update().where(dead_letter.c.id.in_(letters)).values(**settled))
        rows = [(self._ids.new(), letter, self._what, body, self._now, self._by, self._why) for letter in letters]
        await _changes.insert(connection, rows)


def refuse_silence(by: str, why: str) -> None:
    """Refuse to do what nobody would know the reason of.

    Raises:
        ConfigurationError: it is not said who does it, or why.
    """
    if not by.strip() or not why.strip():
        raise ConfigurationError("say who does this, and why (--why): both are kept with the letter")


async def lock(connection: AsyncConnection, condition: Any, limit: int) -> list[Letter]:
    """Return letters, oldest first, and hold them until the end of the transaction."""
    statement = dead_letter.select().where(condition).order_by(dead_letter.c.id).limit(limit)
    if connection.dialect.name == "postgresql":  # SQLite's only writer holds everything locked
        statement = statement.with_for_update()
    return [Letter.of(row) for row in (await connection.execute(statement)).mappings()]


async def call_back(
    connection: AsyncConnection, letters: Iterable[tuple[Letter, Envelope | None]], now: datetime
) -> set[UUID]:
    """Stop replays of which no try runs, and return their letters; what was replayed counts as handled again.

    To be called before the letters are locked: who ends a try locks its row first, and the letter afterwards.
    """
    found = list(letters)
    pending = delete(retry).where(replays_of(letter for letter, _ in found), retry.c.begun_at.is_(None))
    stopped = set((await connection.execute(pending.returning(retry.c.dead_letter_id))).scalars())
    marks = [
        (envelope.key, consumer, None, None, None, now)
        for letter, envelope in found
        if letter.id in stopped and envelope is not None and letter.consumer != COORDINATOR
        for consumer in (letter.consumer, *([OF_SAGAS] if envelope.saga else []))
    ]
    await _handled.insert(connection, marks, unless=("message_key", "consumer"))
    return stopped


def _is_old(before: datetime) -> Any:
    # Who tries a letter that was replayed may open it again.
    return IS_SETTLED & (dead_letter.c.settled_at < before) & not_(_is_awaited)


async def count_old(connection: AsyncConnection, before: datetime) -> int:
    """Count the letters that were settled before, and that no replay may open again."""
    counted: int = (
        await connection.execute(select(func.count()).select_from(dead_letter).where(_is_old(before)))
    ).scalar_one()
    return counted


async def purge(connection: AsyncConnection, before: datetime, limit: int) -> int:
    """Delete some of them, with the record of what was done with them; return how many."""
    columns = dead_letter.c
    statement = select(columns.id).where(_is_old(before)).order_by(columns.settled_at, columns.id).limit(limit)
    if connection.dialect.name == "postgresql":
        statement = statement.with_for_update(skip_locked=True)
    ids = (await connection.execute(statement)).scalars().all()
    await connection.execute(dead_letter.delete().where(columns.id.in_(ids)))
    await connection.execute(dead_letter_change.delete().where(dead_letter_change.c.dead_letter_id.in_(ids)))
    return len(ids)
