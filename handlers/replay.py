"""Dead letters: found, grouped, replayed, edited, discarded.

A replay puts the letter's message where messages wait to be tried again, for the one handler that failed, under the
same event id. Letters of one saga are replayed in their order: each waits until those before it are handled.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic_core import from_json, to_json
from sqlalchemy import ColumnElement, RowMapping, Select, and_, func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from events.bus import Address, Exchange
from events.clock import Clock
from events.codec import Limits, Readable, read_body
from events.database import reader, transaction
from events.dead_letters import BUS, DEAD
from events.envelope import Direction, Envelope
from events.errors import ConfigurationError
from events.ids import Ids
from events.message import DEFAULT_BUNDLE
from events.relay import Entry, insert_entries
from events.tables import dead_letter
from handlers.inbox import OF_SAGAS
from handlers.retries import Retries, Waiting
from handlers.tables import inbox

REPLAYED, DISCARDED = "replayed", "discarded"
_PAGE = 500
_GONE_ON = "its saga was told that it failed and has gone on; what it would do now was, or will be, undone"
_UNKNOWN_WAY = "it is not known where it was sent to"


@dataclass(frozen=True, slots=True)
class Query:
    """Which letters are meant; None is any."""

    ids: Sequence[UUID] | None = None
    consumer: str | None = None
    reason: str | None = None
    fingerprint: str | None = None
    message_type: str | None = None
    saga_id: UUID | None = None
    status: str | None = DEAD

    @property
    def is_narrow(self) -> bool:
        """Whether it names anything but a status."""
        return any(getattr(self, each.name) is not None for each in fields(self) if each.name != "status")

    def condition(self) -> ColumnElement[bool]:
        """Return this as a condition on the table."""
        found = [
            dead_letter.c[each.name] == value
            for each in fields(self)
            if each.name != "ids" and (value := getattr(self, each.name)) is not None
        ]
        if self.ids is not None:
            found.append(dead_letter.c.id.in_(self.ids))
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

    @property
    def summary(self) -> str:
        """The last line of the detail: of a stack that is the error."""
        return next((line for line in reversed(self.detail.splitlines()) if line.strip()), "")


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
class Planned:
    """What a replay does with a letter.

    Attributes:
        letter: the letter.
        refused: why it is not replayed, if it is not.
        after: the seconds after which it is due.
        behind: the older letter of its saga behind which it waits.
        envelope: its message.
    """

    letter: Letter
    refused: str | None = None
    after: float = 0.0
    behind: UUID | None = None
    envelope: Envelope | None = None


class DeadLetters:
    """The dead letters of a database.

    Args:
        engine: the database.
        clock: paces how often the database's clock is asked.
        ids: names rows.
        limits: the largest message that is replayed.
    """

    def __init__(self, engine: AsyncEngine, *, clock: Clock, ids: Ids, limits: Limits | None = None) -> None:
        self._engine = engine
        self._reader = reader(engine)
        self._ids = ids
        self._limits = limits or Limits()
        self._retries = Retries(engine, clock=clock, ids=ids)

    # Looking

    async def find(self, query: Query, *, limit: int = 50) -> list[Letter]:
        """Return letters, newest first."""
        statement = dead_letter.select().where(query.condition()).order_by(dead_letter.c.id.desc()).limit(limit)
        async with self._reader.connect() as connection:
            return [_letter(row) for row in (await connection.execute(statement)).mappings()]

    async def get(self, id: UUID) -> Letter:
        """Return one letter, whatever its status.

        Raises:
            ConfigurationError: there is none.
        """
        found = await self.find(Query(ids=[id], status=None))
        if not found:
            raise ConfigurationError(f"there is no dead letter {id}")
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

    # Replaying

    async def plan(self, query: Query, *, rate: float | None = None) -> AsyncIterator[Planned]:
        """Say what `replay` would do, letter by letter, oldest first. Nothing is changed."""
        number, last = 0, UUID(int=0)
        while True:
            async with self._reader.connect() as connection:
                letters = await self._page(connection, query, last)
                page = await self._plan(connection, letters, number, rate)
            for planned in page:
                yield planned
            if not letters:
                return
            number += sum(planned.refused is None for planned in page)
            last = letters[-1].id

    async def replay(
        self, query: Query, *, rate: float | None = None, by: str, why: str = ""
    ) -> AsyncIterator[Planned]:
        """Replay letters, `rate` a second at most; return what was done, letter by letter, oldest first.

        Each page of letters is one transaction: what was returned is done.
        """
        await self._retries.clock.calibrate()
        number, last = 0, UUID(int=0)
        begun = self._retries.clock.now()
        while True:
            async with transaction(self._engine) as connection:
                letters = await self._page(connection, query, last, lock=True)
                page = await self._plan(connection, letters, number, rate)
                replayed = [planned for planned in page if planned.refused is None]
                await self._send_back(connection, replayed, begun)
                await self._settle(connection, [each.letter.id for each in replayed], REPLAYED, by, why)
            for planned in page:
                yield planned
            if not letters:
                return
            number += len(replayed)
            last = letters[-1].id

    async def _page(self, connection: AsyncConnection, query: Query, last: UUID, *, lock: bool = False) -> list[Letter]:
        statement: Select[Any] = dead_letter.select().where(query.condition(), dead_letter.c.status == DEAD)
        statement = statement.where(dead_letter.c.id > last).order_by(dead_letter.c.id).limit(_PAGE)
        if lock and connection.dialect.name == "postgresql":  # whoever replays the same letters at the same time waits
            statement = statement.with_for_update()
        return [_letter(row) for row in (await connection.execute(statement)).mappings()]

    async def _plan(
        self, connection: AsyncConnection, letters: Sequence[Letter], number: int, rate: float | None
    ) -> list[Planned]:
        older = await self._dead_of_sagas(connection, {letter.saga_id for letter in letters if letter.saga_id})
        page = []
        for letter in letters:
            planned = self._judge(letter)
            if planned.refused is None:
                before = [each for each in older.get(letter.saga_id, []) if each < letter.id] if letter.saga_id else []
                after = number / rate if rate else 0.0
                planned = replace(planned, after=after, behind=max(before, default=None))
                number += 1
            page.append(planned)
        return page

    async def _dead_of_sagas(self, connection: AsyncConnection, sagas: AbstractSet[UUID]) -> dict[UUID, list[UUID]]:
        found: dict[UUID, list[UUID]] = {}
        if sagas:
            columns = dead_letter.c
            statement = select(columns.saga_id, columns.id).where(columns.saga_id.in_(sagas), columns.status == DEAD)
            for saga_id, letter in await connection.execute(statement):
                found.setdefault(saga_id, []).append(letter)
        return found

    def _judge(self, letter: Letter) -> Planned:
        if letter.consumer == BUS and _address(letter) is None:
            return Planned(letter, _UNKNOWN_WAY)
        body = letter.edited_body or letter.body
        parts = read_body(
            body, content_type=letter.content_type, headers=letter.headers, encoding=None, limits=self._limits
        )
        part = parts[0]
        if len(parts) > 1 or not isinstance(part, Readable):
            why = "it holds several messages" if isinstance(part, Readable) else str(part.error)
            return Planned(letter, f"it cannot be read: {why}; edit it first")
        saga = part.envelope.saga
        if letter.consumer != BUS and saga is not None and saga.result is None and saga.direction is Direction.DO:
            return Planned(letter, _GONE_ON)
        return Planned(letter, envelope=part.envelope)

    async def _send_back(self, connection: AsyncConnection, replayed: Sequence[Planned], begun: datetime) -> None:
        waiting, entries = [], []
        for planned in replayed:
            envelope = planned.envelope
            if envelope is None:
                continue
            if (address := _address(planned.letter)) is not None:
                body = planned.letter.edited_body or planned.letter.body
                entries.append(
                    Entry(self._ids.new(), address, DEFAULT_BUNDLE, body, envelope.traceparent, envelope.tracestate)
                )
                continue
            waiting.append(self._waiting(planned.letter, envelope, begun + timedelta(seconds=planned.after)))
        for row in waiting:  # it was recorded as handled, by a failure
            own = inbox.c.consumer.in_((row.consumer, OF_SAGAS))
            await connection.execute(inbox.delete().where(inbox.c.message_key == row.key, own))
        await self._retries.add(connection, waiting)
        if entries:
            await insert_entries(connection, entries, due_at=begun)

    def _waiting(self, letter: Letter, envelope: Envelope, due_at: datetime) -> Waiting:
        return Waiting(
            id=self._ids.new(),
            consumer=letter.consumer,
            key=envelope.key,
            body=letter.edited_body or letter.body,
            content_type=letter.content_type,
            headers=letter.headers,
            message_id=envelope.id,
            message_type=envelope.type,
            saga_id=letter.saga_id,
            traceparent=envelope.traceparent,
            first_at=due_at,
            due_at=due_at,
            dead_letter_id=letter.id,
        )

    # Editing and discarding

    async def edit(self, id: UUID, data: bytes, *, by: str, why: str = "") -> Letter:
        """Give a dead letter other data; it is replayed with these, and the original is kept.

        Raises:
            ConfigurationError: there is no such dead letter, or the data are no JSON object.
        """
        letter = await self.get(id)
        if letter.status != DEAD:
            raise ConfigurationError(f"dead letter {id} is {letter.status}; only what is dead can be edited")
        try:
            document = from_json(letter.edited_body or letter.body)
            changed = from_json(data)
        except ValueError as error:
            raise ConfigurationError(f"this is not JSON: {error}") from error
        if not isinstance(document, dict) or not isinstance(changed, dict):
            raise ConfigurationError("the data of an event are a JSON object")
        body = to_json({**document, "data": changed} if "specversion" in document else changed)
        [part] = read_body(
            body, content_type=letter.content_type, headers=letter.headers, encoding=None, limits=self._limits
        )
        if not isinstance(part, Readable):
            raise ConfigurationError(f"nobody could read that: {part.error}")
        values = {"edited_body": body, "settled_by": by, "settled_why": why}
        async with transaction(self._engine) as connection:
            await connection.execute(dead_letter.update().where(dead_letter.c.id == id).values(**values))
        return await self.get(id)

    async def discard(self, query: Query, *, by: str, why: str) -> int:
        """Settle letters without a replay; they stay in the table. Return how many there were."""
        async with transaction(self._engine) as connection:
            statement = select(dead_letter.c.id).where(query.condition(), dead_letter.c.status == DEAD)
            ids = list((await connection.execute(statement)).scalars())
            for begin in range(0, len(ids), _PAGE):
                await self._settle(connection, ids[begin : begin + _PAGE], DISCARDED, by, why)
        return len(ids)

    async def _settle(self, connection: AsyncConnection, ids: Sequence[UUID], status: str, by: str, why: str) -> None:
        if ids:
            now = self._retries.clock.now()
            values = {"status": status, "settled_at": now, "settled_by": by, "settled_why": why}
            await connection.execute(dead_letter.update().where(dead_letter.c.id.in_(ids)).values(**values))


def _letter(row: RowMapping) -> Letter:
    return Letter(**{each.name: row[each.name] for each in fields(Letter)})


def _address(letter: Letter) -> Address | None:
    """Return where a message was sent that reached no queue."""
    exchange, key = letter.headers.get("exchange"), letter.headers.get("routing_key")
    if letter.consumer != BUS or exchange not in {each.value for each in Exchange} or not isinstance(key, str):
        return None
    return Address(Exchange(exchange), key)
