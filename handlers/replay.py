"""Dead letters: found, grouped, replayed, edited, discarded.

A replay puts the letter's message where messages wait to be tried again, for the one handler that failed, under the
same event id. Letters of one saga are replayed in their order: each waits until those before it are handled.
"""

import re
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
from events.codec import Limits, Part, Readable, read_body
from events.database import reader, transaction
from events.dead_letters import BROKER_REASONS, BUS, CONFLICT, DEAD
from events.envelope import Direction, Envelope
from events.errors import ConfigurationError
from events.ids import Ids
from events.message import DEFAULT_BUNDLE
from events.relay import Entry, insert_entries
from events.tables import dead_letter
from handlers.inbox import OF_SAGAS
from handlers.retries import Retries, Waiting
from handlers.tables import inbox, retry

REPLAYED, DISCARDED = "replayed", "discarded"
_PAGE = 500
_GONE_ON = "its saga was told that it failed and has gone on; what it would do now was, or will be, undone"
_TAKEN = "another message with its id was handled; publish it under an id of its own"
_UNKNOWN_WAY = "it is not known where it was sent to"
_EXACT = ("consumer", "reason", "fingerprint", "message_type", "saga_id", "status")
_begin_of_id = re.compile(r"[0-9a-f]{1,32}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Query:
    """Which letters are meant; None is any. `since` and `until` limit when they died."""

    ids: Sequence[UUID] | None = None
    consumer: str | None = None
    reason: str | None = None
    fingerprint: str | None = None
    message_type: str | None = None
    saga_id: UUID | None = None
    status: str | None = DEAD
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_narrow(self) -> bool:
        """Whether it names anything but a status."""
        return any(getattr(self, each.name) is not None for each in fields(self) if each.name != "status")

    def condition(self) -> ColumnElement[bool]:
        """Return this as a condition on the table."""
        found = [dead_letter.c[name] == value for name in _EXACT if (value := getattr(self, name)) is not None]
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

    @property
    def summary(self) -> str:
        """The first line of the error; of a detail that is no stack the last one."""
        lines = [line for line in reversed(self.detail.splitlines()) if line.strip()]
        errors = (line for line in lines if self.error_type and line.lstrip(" |+").startswith(self.error_type))
        return next(errors, lines[0] if lines else "")

    @property
    def to_send(self) -> bytes:
        """The body that a replay takes."""
        return self.edited_body or self.body

    @property
    def was_given_up_by_broker(self) -> bool:
        """Whether no handler has given it up: one may have handled it, and then it is not to be handled again."""
        return self.reason in BROKER_REASONS and self.error_type is None


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
        held_by: an older letter of its saga that cannot be replayed: this one waits until that is discarded.
        envelope: its message.
    """

    letter: Letter
    refused: str | None = None
    after: float = 0.0
    behind: UUID | None = None
    held_by: UUID | None = None
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
            found = [_letter(row) for row in (await connection.execute(statement)).mappings()]
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

    # Replaying

    async def plan(self, query: Query, *, rate: float | None = None) -> AsyncIterator[Planned]:
        """Say what `replay` would do, letter by letter, oldest first. Nothing is changed.

        Raises:
            ConfigurationError: the rate is none.
        """
        _check(rate)
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

        Raises:
            ConfigurationError: the rate is none.
        """
        _check(rate)
        await self._retries.clock.calibrate()
        number, last = 0, UUID(int=0)
        begun = self._retries.clock.now()
        while True:
            async with transaction(self._engine) as connection:
                letters = await self._page(connection, query, last, lock=True)
                page = await self._plan(connection, letters, number, rate)
                replayed = [planned for planned in page if planned.refused is None]
                await self._send_back(connection, replayed, begun)
                ids = [each.letter.id for each in replayed]
                await self._record(connection, Query(ids=ids), by, why, status=REPLAYED)
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
        older = await self._unhandled_of_sagas(connection, {letter.saga_id for letter in letters if letter.saga_id})
        page = []
        for letter in letters:
            planned = self._judge(letter)
            if planned.refused is None:
                planned = replace(planned, after=number / rate if rate else 0.0)
                number += 1
            if planned.refused is None and letter.saga_id is not None and letter.consumer != BUS:
                before = {each: stays for each, stays in older.get(letter.saga_id, {}).items() if each < letter.id}
                held_by = max((each for each, stays in before.items() if stays), default=None)
                planned = replace(planned, behind=max(before, default=None), held_by=held_by)
            page.append(planned)
        return page

    async def _unhandled_of_sagas(
        self, connection: AsyncConnection, sagas: AbstractSet[UUID]
    ) -> dict[UUID, dict[UUID, bool]]:
        """Return the letters of `sagas` that are dead or being replayed, and whether each cannot be replayed."""
        found: dict[UUID, dict[UUID, bool]] = {}
        if sagas:
            dead = dead_letter.select().where(dead_letter.c.saga_id.in_(sagas), dead_letter.c.status == DEAD)
            for letter in [_letter(row) for row in (await connection.execute(dead)).mappings()]:
                if letter.saga_id is not None:
                    found.setdefault(letter.saga_id, {})[letter.id] = self._judge(letter).refused is not None
            columns = retry.c.saga_id, retry.c.dead_letter_id
            waiting = select(*columns).where(retry.c.saga_id.in_(sagas), retry.c.dead_letter_id.is_not(None))
            for saga_id, replayed in await connection.execute(waiting):
                found.setdefault(saga_id, {}).setdefault(replayed, False)
        return found

    def _judge(self, letter: Letter) -> Planned:
        if letter.consumer == BUS and _address(letter) is None:
            return Planned(letter, _UNKNOWN_WAY)
        if letter.reason == CONFLICT:
            return Planned(letter, _TAKEN)
        parts = self._read(letter, letter.to_send)
        part = parts[0]
        if len(parts) > 1 or not isinstance(part, Readable):
            why = "it holds several messages" if isinstance(part, Readable) else str(part.error)
            return Planned(letter, f"it cannot be read: {why}; edit it first")
        saga = part.envelope.saga
        if letter.consumer != BUS and saga is not None and saga.result is None and saga.direction is Direction.DO:
            return Planned(letter, _GONE_ON)
        return Planned(letter, envelope=part.envelope)

    def _read(self, letter: Letter, body: bytes) -> list[Part]:
        return read_body(
            body, content_type=letter.content_type, headers=letter.headers, encoding=None, limits=self._limits
        )

    async def _send_back(self, connection: AsyncConnection, replayed: Sequence[Planned], begun: datetime) -> None:
        waiting: list[Waiting] = []
        entries: list[Entry] = []
        failures: dict[str, list[UUID]] = {}  # recorded as handled: keys by their consumer
        for planned in replayed:
            letter, envelope = planned.letter, planned.envelope
            if envelope is None:
                continue
            if (address := _address(letter)) is not None:
                trace = envelope.traceparent, envelope.tracestate
                entries.append(Entry(self._ids.new(), address, DEFAULT_BUNDLE, letter.to_send, *trace))
                continue
            waiting.append(self._waiting(letter, envelope, begun + timedelta(seconds=planned.after)))
            if not letter.was_given_up_by_broker:
                failures.setdefault(letter.consumer, []).append(envelope.key)
        for consumer, keys in failures.items():
            own = inbox.c.consumer.in_((consumer, OF_SAGAS))
            await connection.execute(inbox.delete().where(inbox.c.message_key.in_(keys), own))
        await self._retries.add(connection, waiting)
        if entries:
            await insert_entries(connection, entries, due_at=begun)

    def _waiting(self, letter: Letter, envelope: Envelope, due_at: datetime) -> Waiting:
        return Waiting(
            id=self._ids.new(),
            consumer=letter.consumer,
            key=envelope.key,
            body=letter.to_send,
            content=None,  # it may have been edited
            content_type=letter.content_type,
            headers=letter.headers,
            message_id=envelope.id,
            message_type=envelope.type,
            saga_id=envelope.saga.saga_id if envelope.saga else None,
            traceparent=envelope.traceparent,
            first_at=due_at,
            due_at=due_at,
            dead_letter_id=letter.id,
        )

    # Editing and discarding

    async def edit(self, id: UUID, body: bytes, *, by: str, why: str = "") -> Letter:
        """Give a dead letter another body; it is replayed with this one, and the original is kept.

        Raises:
            ConfigurationError: there is no such dead letter, or this is not the same message.
        """
        letter = await self.get(id)
        parts = self._read(letter, body)
        if not isinstance(parts[0], Readable):
            raise ConfigurationError(f"nobody could read that: {parts[0].error}")
        if len(parts) > 1:
            raise ConfigurationError("these are several events; a letter is one")
        [original, *_] = self._read(letter, letter.body)
        if isinstance(original, Readable):
            for name in ("id", "source", "type", "saga", "reply_to"):
                if getattr(parts[0].envelope, name) != getattr(original.envelope, name):
                    raise ConfigurationError(f"the event's {name} must stay as it was: it is the same message")
        if not await self._settle(Query(ids=[letter.id]), by=by, why=why, edited_body=body):
            raise ConfigurationError(f"dead letter {id} is {letter.status}; only what is dead can be edited")
        return await self.get(letter.id)

    async def discard(self, query: Query, *, by: str, why: str) -> int:
        """Settle letters without a replay; they stay in the table. Return how many there were."""
        return await self._settle(query, by=by, why=why, status=DISCARDED)

    async def _settle(self, query: Query, *, by: str, why: str, **values: Any) -> int:
        """Record what is done with those of `query` that are dead, whatever others do with them at the same time."""
        await self._retries.clock.calibrate()
        async with transaction(self._engine) as connection:
            return await self._record(connection, query, by, why, **values)

    async def _record(self, connection: AsyncConnection, query: Query, by: str, why: str, **values: Any) -> int:
        done = {"settled_at": self._retries.clock.now(), "settled_by": by, "settled_why": why, **values}
        which = query.condition(), dead_letter.c.status == DEAD
        return (await connection.execute(dead_letter.update().where(*which).values(**done))).rowcount


def with_data(letter: Letter, data: bytes) -> bytes:
    """Return the body of a letter with other data; the rest of its envelope stays as it is.

    Raises:
        ConfigurationError: one of the two is no JSON object.
    """
    try:
        changed = from_json(data)
    except ValueError as error:
        raise ConfigurationError(f"this is not JSON: {error}") from error
    if not isinstance(changed, dict):
        raise ConfigurationError("the data of an event are a JSON object")
    try:
        document = from_json(letter.to_send)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ConfigurationError(f"dead letter {letter.id} has no envelope that can be kept; give the whole event")
    return to_json({**document, "data": changed} if "specversion" in document else changed)


def _check(rate: float | None) -> None:
    if rate is not None and not rate > 0:
        raise ConfigurationError(f"a rate is more than 0 letters a second, not {rate:g}")


def _letter(row: RowMapping) -> Letter:
    return Letter(**{each.name: row[each.name] for each in fields(Letter)})


def _address(letter: Letter) -> Address | None:
    """Return where a message was sent that reached no queue."""
    exchange, key = letter.headers.get("exchange"), letter.headers.get("routing_key")
    if letter.consumer != BUS or exchange not in {each.value for each in Exchange} or not isinstance(key, str):
        return None
    return Address(Exchange(exchange), key)
