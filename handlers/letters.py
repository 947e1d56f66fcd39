"""Dead letters as operators find them: one by one, by query, by cause, and what was done with them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, RowMapping, and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncEngine

from events.codec import STRUCTURED_TYPE, Limits, Part, read_body
from events.database import reader
from events.dead_letters import BROKER_REASONS, DEAD, storable, summary_of
from events.errors import ConfigurationError
from events.tables import dead_letter, dead_letter_change
from handlers.tables import retry

REPLAYED, DISCARDED, EDITED = "replayed", "discarded", "edited"
_EXACT = ("consumer", "reason", "fingerprint", "message_type", "saga_id", "status")
_begin_of_id = re.compile(r"[0-9a-f]{1,32}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Query:
    """Which letters are meant; None is any. `since` and `until` limit when they died.

    Raises:
        ConfigurationError: it ends before it begins.
    """

    ids: Sequence[UUID] | None = None
    consumer: str | None = None
    reason: str | None = None
    fingerprint: str | None = None
    message_type: str | None = None
    saga_id: UUID | None = None
    status: str | None = DEAD
    since: datetime | None = None
    until: datetime | None = None

    def __post_init__(self) -> None:
        if self.since is not None and self.until is not None and self.since >= self.until:
            raise ConfigurationError(f"no letter died both at {self.since} or later and before {self.until}")

    @property
    def is_narrow(self) -> bool:
        """Whether it names anything but a status."""
        return any(getattr(self, each.name) is not None for each in fields(self) if each.name != "status")

    def condition(self) -> ColumnElement[bool]:
        """Return this as a condition on the table."""
        given = {name: value for name in _EXACT if (value := getattr(self, name)) is not None}
        found = [
            dead_letter.c[name] == (storable(each) if isinstance(each, str) else each) for name, each in given.items()
        ]
        if self.ids is not None:
            found.append(dead_letter.c.id.in_(self.ids))
        if self.since is not None:
            found.append(dead_letter.c.dead_at >= self.since)
        if self.until is not None:
            found.append(dead_letter.c.dead_at < self.until)
        return and_(True, *found)  # SQLAlchemy's way to begin with nothing


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter: a row of the table."""

    id: UUID
    consumer: str
    reason: str
    detail: str
    body: bytes
    content_type: str | None
    headers: Mapping[str, Any]
    message_id: str | None
    message_type: str | None
    saga_id: UUID | None
    traceparent: str | None
    attempts: int
    dead_at: datetime
    error_type: str | None
    first_at: datetime | None
    fingerprint: str
    status: str
    settled_at: datetime | None
    settled_by: str | None
    settled_why: str | None
    edited_body: bytes | None

    @classmethod
    def of(cls, row: RowMapping) -> "Letter":
        """Return what a row holds."""
        return cls(**{each.name: row[each.name] for each in fields(cls)})

    @property
    def summary(self) -> str:
        """The first line of the error; of a detail that is no stack the last one."""
        return summary_of(self.detail, self.error_type)

    @property
    def to_send(self) -> bytes:
        """The body that a replay takes."""
        return self.edited_body or self.body

    @property
    def type_to_send(self) -> str | None:
        """The content type of the body that a replay takes: what was edited is a structured event."""
        return STRUCTURED_TYPE if self.edited_body else self.content_type

    @property
    def was_given_up_by_broker(self) -> bool:
        """Whether no handler has given it up: one may have handled it, and then it is not to be handled again."""
        return self.reason in BROKER_REASONS and self.error_type is None

    def read(self, limits: Limits) -> list[Part]:
        """Take apart the body that a replay takes."""
        return read_body(
            self.to_send, content_type=self.type_to_send, headers=self.headers, encoding=None, limits=limits
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Letters that died of the same cause."""

    consumer: str
    reason: str
    fingerprint: str
    count: int
    first_at: datetime
    last_at: datetime
    example: Letter


@dataclass(frozen=True, slots=True)
class Change:
    """What somebody has done with a letter, or of what it had died before it was replayed in vain.

    Attributes:
        id: names this entry.
        dead_letter_id: the letter.
        act: `replayed`, `discarded`, `edited` or `died`.
        changed_at: when.
        changed_by: who.
        reason: why.
        body: what an edit has put in the place of the body.
    """

    id: UUID
    dead_letter_id: UUID
    act: str
    changed_at: datetime
    changed_by: str
    reason: str
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Replay:
    """The try that a replayed letter waits for.

    Attributes:
        due_at: when it is due, or the lease of who tries it.
        begun_at: when the try has begun that runs.
        attempts: how often it was tried since the replay.
    """

    due_at: datetime
    begun_at: datetime | None
    attempts: int


class Letters:
    """The dead letters of a database, to be looked at.

    Args:
        engine: the database.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._reader = reader(engine)

    async def find(self, query: Query, *, limit: int = 50) -> list[Letter]:
        """Return letters, newest first."""
        statement = dead_letter.select().where(query.condition()).order_by(dead_letter.c.id.desc()).limit(limit)
        async with self._reader.connect() as connection:
            return [Letter.of(row) for row in (await connection.execute(statement)).mappings()]

    async def get(self, reference: UUID | str) -> Letter:
        """Return the letter with this id, or whose id alone begins so, whatever its status.

        Raises:
            ConfigurationError: there is none, or there are several.
        """
        begin = str(reference).replace("-", "").lower()
        if not _begin_of_id.fullmatch(begin):
            raise ConfigurationError(f"{str(reference)!r} is no id of a dead letter, nor the begin of one")
        ids = (UUID(begin.ljust(32, "0")), UUID(begin.ljust(32, "f")))
        statement = dead_letter.select().where(dead_letter.c.id.between(*ids)).limit(2)
        async with self._reader.connect() as connection:
            found = [Letter.of(row) for row in (await connection.execute(statement)).mappings()]
        if not found:
            raise ConfigurationError(f"there is no dead letter {reference}")
        if len(found) > 1:
            raise ConfigurationError(f"several dead letters begin with {reference}; give more of the id")
        return found[0]

    async def groups(self, query: Query) -> list[Group]:
        """Return letters by cause, the largest group first."""
        columns = dead_letter.c
        by = (columns.consumer, columns.reason, columns.fingerprint)
        last = func.max(columns.dead_at), func.count()
        statement = select(*by, func.min(columns.first_at), *last).where(query.condition()).group_by(*by)
        async with self._reader.connect() as connection:
            rows = (await connection.execute(statement)).all()
        groups = []
        for consumer, reason, fingerprint, first_at, last_at, count in rows:
            alike = replace(query, consumer=consumer, reason=reason, fingerprint=fingerprint)
            if example := await self.find(alike, limit=1):
                groups.append(Group(consumer, reason, fingerprint, count, first_at, last_at, example[0]))
        return sorted(groups, key=lambda group: -group.count)

    async def changes(self, letter: UUID) -> list[Change]:
        """Return who has done what with a letter, when and why, and its earlier deaths, in order."""
        columns = dead_letter_change.c
        statement = dead_letter_change.select().where(columns.dead_letter_id == letter)
        statement = statement.order_by(columns.changed_at, columns.id)
        async with self._reader.connect() as connection:
            rows = (await connection.execute(statement)).mappings()
            return [Change(**{each.name: row[each.name] for each in fields(Change)}) for row in rows]

    async def replay_of(self, letter: Letter) -> Replay | None:
        """Return the try that a letter waits for; None if it waits for none."""
        statement = select(retry.c.due_at, retry.c.begun_at, retry.c.attempts).where(replays_of([letter]))
        async with self._reader.connect() as connection:
            row = (await connection.execute(statement)).first()
        return Replay(*row) if row else None


def replays_of(letters: Iterable[Letter]) -> ColumnElement[bool]:
    """Return the condition on the rows that replay `letters`, in the words of the index on them."""
    return or_(False, *(and_(retry.c.saga_id == each.saga_id, retry.c.dead_letter_id == each.id) for each in letters))
