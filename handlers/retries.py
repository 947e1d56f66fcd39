"""Messages that wait to be tried again: rows, so that a wait holds nothing up, and outlives any process.

A message comes here when its quick tries have failed, and when it is delivered a second time: then its process
may have died of it. A row that is due is taken under a lease, and its try is counted before it begins. So a
message that kills its process is known by a try that has begun and not ended; it is then tried alone.
"""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import TextualSelect, Uuid, bindparam, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from events.bulk import Bulk, Lookup, delete_by_id
from events.clock import Clock
from events.codec import Readable
from events.database import reader, transaction
from events.dead_letters import plain_headers, storable
from events.failpoints import failpoint
from events.ids import Ids
from events.intake import Item
from events.storeclock import StoreClock
from events.tables import Timestamp
from handlers.tables import retry

LEASE = 15.0  # seconds
_MAX_DETAIL = 8000
_COLUMNS = tuple(column.name for column in retry.columns)
_insert = Bulk(retry, *_COLUMNS)
_postpone = Bulk(retry, "id", "attempts", "crashes", "begun_at", "due_at", "reason", "error_type", "detail")

# A replayed dead letter waits for those of its saga that are older: until they are handled, or as long as they are
# dead. What began and did not end is a suspect, and not taken together with others.
_IN_ORDER = """
    (r.dead_letter_id IS NULL OR r.saga_id IS NULL OR NOT EXISTS (
        SELECT 1 FROM retry older WHERE older.saga_id = r.saga_id AND older.dead_letter_id < r.dead_letter_id
    ) AND NOT EXISTS (
        SELECT 1 FROM dead_letter dead
        WHERE dead.saga_id = r.saga_id AND dead.status = 'dead' AND dead.id < r.dead_letter_id
    ))
"""
_ANY = "r.begun_at IS NULL AND r.crashes = 0"
_SUSPECT = "(r.begun_at IS NOT NULL OR r.crashes > 0)"
_CLAIM = """
    UPDATE retry SET
        due_at = :until, begun_at = :now, attempts = attempts + 1,
        crashes = crashes + CASE WHEN begun_at IS NULL THEN 0 ELSE 1 END
    WHERE id IN (
        SELECT r.id FROM retry r
        WHERE r.consumer = :consumer AND r.due_at <= :due AND r.id NOT IN :held AND {which} AND {in_order}
        ORDER BY r.due_at, r.id LIMIT :most {lock}
    )
    RETURNING *
"""
_DUE = """
    SELECT r.consumer, sum(CASE WHEN {any} THEN 1 ELSE 0 END), sum(CASE WHEN {any} THEN 0 ELSE 1 END)
    FROM retry r WHERE r.due_at <= :now AND {in_order} GROUP BY r.consumer
"""


def _claim(which: str, lock: str) -> TextualSelect:
    return (
        text(_CLAIM.format(which=which, in_order=_IN_ORDER, lock=lock))
        .bindparams(*(bindparam(name, type_=Timestamp) for name in ("until", "now", "due")))
        .bindparams(bindparam("held", type_=Uuid, expanding=True))
        .columns(*retry.columns)
    )


_CLAIMS = {
    (dialect, suspect): _claim(_SUSPECT if suspect else _ANY, lock)
    for dialect, lock in (("postgresql", "FOR UPDATE SKIP LOCKED"), ("sqlite", ""))
    for suspect in (False, True)
}
_COUNT_DUE = text(_DUE.format(any=_ANY, in_order=_IN_ORDER)).bindparams(bindparam("now", type_=Timestamp))
_RENEW = Bulk(retry, "id", "due_at")
_HELD = Lookup(retry, "id", "begun_at", key="id", lock=True)
_FAR_FUTURE = timedelta(days=36500)


@dataclass(slots=True)
class Waiting:
    """A message that waits to be tried again: a row of the table.

    Attributes:
        consumer: the handler.
        key: what duplicates of the message have in common.
        body, content_type, headers: the message as it came.
        content: the digest of its content; None where nothing is to be compared with it.
        attempts: how often it was tried, the try that runs included.
        crashes: how often a try began and did not end.
        first_at: when it was tried first.
        due_at: when it is to be tried next.
        begun_at: when the try began whose end is not recorded.
        reason, error_type, detail: why the last try failed.
        dead_letter_id: the dead letter that this replays.
        held_since: the begin of the try for which it was taken; once another one has begun it is no longer ours.
    """

    id: UUID
    consumer: str
    key: UUID
    body: bytes
    content: bytes | None
    content_type: str | None
    headers: Mapping[str, Any]
    message_id: str
    message_type: str
    saga_id: UUID | None
    traceparent: str | None
    first_at: datetime
    due_at: datetime
    attempts: int = 0
    crashes: int = 0
    begun_at: datetime | None = None
    reason: str | None = None
    error_type: str | None = None
    detail: str | None = None
    dead_letter_id: UUID | None = None
    held_since: datetime | None = None

    @classmethod
    def of(cls, item: Item, part: Readable, *, id: UUID, consumer: str, now: datetime) -> "Waiting":
        """Return a row for a message as it was delivered; it is due at once."""
        envelope, delivery = part.envelope, item.delivery
        return cls(
            id=id,
            consumer=consumer,
            key=envelope.key,
            body=part.raw,
            content=envelope.content,
            content_type=delivery.content_type and storable(delivery.content_type),
            headers=plain_headers(delivery.headers),
            message_id=envelope.id,
            message_type=envelope.type,
            saga_id=envelope.saga.saga_id if envelope.saga else None,
            traceparent=envelope.traceparent,
            first_at=now,
            due_at=now,
        )

    def row(self) -> tuple[Any, ...]:
        """Return the values in the order of the table's columns."""
        return (
            self.id,
            self.consumer,
            self.key,
            self.body,
            self.content,
            self.content_type,
            dict(self.headers),
            self.message_id,
            self.message_type,
            self.saga_id,
            self.traceparent,
            self.attempts,
            self.crashes,
            self.first_at,
            self.begun_at,
            self.due_at,
            self.reason,
            self.error_type,
            self.detail and storable(self.detail)[-_MAX_DETAIL:],
            self.dead_letter_id,
        )


@dataclass(slots=True)
class Parked:
    """A waiting message that was taken: a delivery like those of the bus. The row goes with the outcome's commit."""

    row: Waiting
    redelivered: bool = False
    content_encoding: str | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    body: bytes = field(init=False)
    content_type: str | None = field(init=False)
    headers: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.body = self.row.body
        self.content_type = self.row.content_type
        self.headers = self.row.headers

    async def ack(self) -> None:
        """See `Delivery.ack`: what becomes of the row was in the transaction that is committed now."""
        self.settled.set()

    async def requeue(self) -> None:
        """See `Delivery.requeue`: the row is still there, and due when its lease is over."""
        self.settled.set()


def row_of(item: Item) -> Waiting | None:
    """Return the row that `item` was taken from, None for what came from the bus."""
    return item.delivery.row if isinstance(item.delivery, Parked) else None


class Retries:
    """The table of messages that wait to be tried again.

    Args:
        engine: the database.
        clock: paces how often the database's own clock is asked; due times and leases count on that one.
        ids: names the rows.
    """

    def __init__(self, engine: AsyncEngine, *, clock: Clock, ids: Ids) -> None:
        self._engine = engine
        self._reader = reader(engine)
        self._ids = ids
        self.clock = StoreClock(engine, clock)

    def new_id(self) -> UUID:
        """Return an id for a new row."""
        return self._ids.new()

    # In the transaction of an outcome; may stand in a block of `together`

    async def add(self, connection: AsyncConnection, rows: Sequence[Waiting]) -> None:
        """Store `rows`; one whose message waits already is left as it is."""
        ordered = sorted(rows, key=lambda row: row.key.int)  # one order for everybody: two batches cannot deadlock
        await _insert.insert(connection, [row.row() for row in ordered], unless=("message_key", "consumer"))

    async def postpone(self, connection: AsyncConnection, rows: Sequence[Waiting]) -> None:
        """Record that a try of `rows` has ended, and when the next is due.

        Raises:
            StaleRowError: the lease of one has passed on, and whoever took it has begun a try. Roll back.
        """
        ordered = sorted(rows, key=lambda row: row.id.int)
        values = [
            (
                row.id,
                row.attempts,
                row.crashes,
                row.begun_at,
                row.due_at,
                row.reason,
                row.error_type,
                row.detail and storable(row.detail)[-_MAX_DETAIL:],
            )
            for row in ordered
        ]
        held = [row.held_since for row in ordered]
        await _postpone.update(connection, values, key="id", expected=("begun_at", held))

    async def still_held(self, connection: AsyncConnection, rows: Sequence[Waiting]) -> list[Waiting]:
        """Lock `rows`, and return those whose lease has not passed on since they were taken."""
        begun: dict[UUID, datetime | None] = dict(await _HELD.find(connection, [row.id for row in rows]))
        return [row for row in rows if row.held_since is not None and begun.get(row.id) == row.held_since]

    async def remove(self, connection: AsyncConnection, rows: Iterable[Waiting]) -> None:
        """Delete `rows`: their messages are handled, or given up on."""
        await delete_by_id(connection, retry, sorted((row.id for row in rows), key=lambda each: each.int))

    async def call_off(self, connection: AsyncConnection, key: UUID) -> None:
        """Delete the row of a message that is not to be tried any more; one that is being tried speaks for itself."""
        await connection.execute(retry.delete().where(retry.c.message_key == key, retry.c.begun_at.is_(None)))

    # In transactions of their own

    async def count_due(self) -> dict[str, tuple[int, int]]:
        """Return for each consumer how many messages are due, and how many suspects; those in whose way none is."""
        async with self._reader.connect() as connection:
            found = (await connection.execute(_COUNT_DUE, {"now": self.clock.now()})).all()
        return {consumer: (int(usual), int(suspects)) for consumer, usual, suspects in found}

    async def claim(
        self,
        consumer: str,
        most: int,
        *,
        held: Collection[UUID] = (),
        suspects: bool = False,
        due_or_not: bool = False,
    ) -> list[Waiting]:
        """Take messages of `consumer` that are due, and count the try that now begins.

        Args:
            consumer: the handler.
            most: how many at most.
            held: rows that this process holds, and does not take from itself although their leases have lapsed.
            suspects: those with a try that has not ended, instead of all others.
            due_or_not: also those that are to wait longer, the first due first.
        """
        now = self.clock.now()
        parameters = {
            "consumer": consumer,
            "now": now,
            "until": now + timedelta(seconds=LEASE),
            "due": now + _FAR_FUTURE if due_or_not else now,
            "most": most,
            "held": list(held),
        }
        async with transaction(self._engine) as connection:
            found = await connection.execute(_CLAIMS[connection.dialect.name, suspects], parameters)
            rows = found.all()
            await failpoint("retries.before_claim")
        await failpoint("retries.claimed")
        return sorted((_waiting(row) for row in rows), key=lambda row: row.id.int)

    async def renew(self, rows: Sequence[Waiting]) -> None:
        """Hold `rows` for another lease."""
        until = self.clock.now() + timedelta(seconds=LEASE)
        async with transaction(self._engine) as connection:
            held = sorted((row.id for row in await self.still_held(connection, rows)), key=lambda each: each.int)
            await _RENEW.update(connection, [(each, until) for each in held], key="id")

    async def give_back(self, rows: Sequence[Waiting]) -> None:
        """Give up the lease of `rows`, whose tries have not begun after all."""
        if not rows:
            return
        now = self.clock.now()
        for row in rows:
            row.attempts, row.begun_at, row.due_at = row.attempts - 1, None, now
        async with transaction(self._engine) as connection:
            await self.postpone(connection, await self.still_held(connection, rows))

    async def free(self, consumers: Sequence[str]) -> None:
        """End all leases of `consumers`: nobody else works on this database, so their holders are dead."""
        statement = retry.update().where(retry.c.consumer.in_(consumers), retry.c.begun_at.is_not(None))
        async with transaction(self._engine) as connection:
            await connection.execute(statement.values(due_at=self.clock.now()))


def _waiting(row: Any) -> Waiting:
    fields = dict(row._mapping)  # noqa: SLF001  # SQLAlchemy's public name for it
    fields["key"] = fields.pop("message_key")
    return Waiting(**fields, held_since=fields["begun_at"])
