"""Publishes the outbox: straight from memory after a commit, and from the table whatever was left behind.

A row is deleted only after the broker has confirmed it. A row that was written by a running process is leased
to that process (`due_at` lies ahead), so sweepers leave it alone unless that process dies.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import TextualSelect, bindparam, event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.orm import Session

from events.bulk import Bulk, delete_by_id
from events.bus import Address, Bus, Delivery, Exchange, Outgoing
from events.clock import Clock
from events.codec import Limits, bundle_body
from events.database import is_transient, single_statements, transaction
from events.dead_letters import DeadLetter, bury
from events.errors import PublishError, UnroutableError
from events.failpoints import failpoint
from events.ids import Ids, Random
from events.outbox import ADDED, AfterCommit, Outbound
from events.service import Supervisor, is_cancelled
from events.storeclock import StoreClock
from events.tables import Timestamp, outbox
from events.unroutable import age_of, log_given_up, unroutable_letter

logger = logging.getLogger(__name__)

_COLUMNS = ("id", "exchange", "routing_key", "bundle", "body", "traceparent", "tracestate", "attempts", "due_at")
_insert = Bulk(outbox, *_COLUMNS)
_CLAIM = """
    UPDATE outbox SET due_at = :until
    WHERE id IN (SELECT id FROM outbox WHERE due_at <= :now ORDER BY id LIMIT :most {lock})
    RETURNING id, exchange, routing_key, bundle, body, traceparent, tracestate, attempts
"""


def _claim_statement(lock: str) -> TextualSelect:
    """One process at a time gets a row: the lock on PostgreSQL, the only connection on SQLite."""
    return (
        text(_CLAIM.format(lock=lock))
        .bindparams(bindparam("until", type_=Timestamp), bindparam("now", type_=Timestamp))
        .columns(*(outbox.c[name] for name in _COLUMNS if name != "due_at"))
    )


_CLAIM_POSTGRES = _claim_statement("FOR UPDATE SKIP LOCKED")
_CLAIM_SQLITE = _claim_statement("")
_postpone = Bulk(outbox, "id", "attempts", "due_at", "error")


@dataclass(slots=True)
class Entry:
    """A row of the outbox."""

    id: UUID
    address: Address
    bundle: int
    body: bytes
    traceparent: str | None
    tracestate: str | None
    attempts: int = 0


@dataclass(slots=True)
class Bundle:
    """Entries for one address that travel as one message."""

    entries: list[Entry]
    most: int
    size: int = 2

    def outgoing(self) -> Outgoing:
        first = self.entries[0]
        traces = {entry.traceparent[:35] for entry in self.entries if entry.traceparent}
        links = tuple(entry.traceparent for entry in self.entries if entry.traceparent) if len(traces) > 1 else ()
        return Outgoing(
            first.address,
            bundle_body([entry.body for entry in self.entries]),
            traceparent=first.traceparent,
            tracestate=first.tracestate,
            links=links,
        )


def bundled(entries: Iterable[Entry], limits: Limits, *, share: int) -> list[Bundle]:
    """Put entries for the same address together, in order.

    A bundle holds no more than its entries allow, no more bytes than `limits.body`, and no more than a
    `share` of the entries for its address, so that several consumers get something to do.
    """
    by_address: dict[Address, list[Entry]] = {}
    for entry in entries:
        by_address.setdefault(entry.address, []).append(entry)
    bundles: list[Bundle] = []
    for same in by_address.values():
        fair = max(1, -(-len(same) // share))
        bundle: Bundle | None = None
        for entry in same:
            size = len(entry.body) + 1
            if (
                bundle is None
                or len(bundle.entries) >= min(entry.bundle, bundle.most)
                or bundle.size + size > limits.body
            ):
                bundle = Bundle([], most=fair)
                bundles.append(bundle)
            bundle.entries.append(entry)
            bundle.most = min(bundle.most, entry.bundle)
            bundle.size += size
    return bundles


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """How the relay works.

    Attributes:
        lease: seconds for which a row belongs to the process that wrote or took it.
        sweep_every: seconds between looks for rows left behind.
        sweep_limit: rows taken at a time.
        backoff_first: seconds before the second try of a row; doubles up to `backoff_most`, with jitter.
        share: a bundle takes at most one part in `share` of what waits for its address.
        unroutable_for: seconds after which a message that no queue takes becomes a dead letter.
        delete_every: seconds for which confirmed rows are collected before they are deleted together.
    """

    lease: float = 15.0
    sweep_every: float = 1.0
    sweep_limit: int = 500
    backoff_first: float = 0.5
    backoff_most: float = 30.0
    share: int = 2
    unroutable_for: float = 3600.0
    delete_every: float = 0.1


class Relay:
    """Moves the outbox of one database to the bus. Also the `Outbox` that the engine and handlers write to."""

    def __init__(
        self,
        engine: AsyncEngine,
        bus: Bus,
        *,
        clock: Clock,
        ids: Ids,
        random: Random,
        limits: Limits,
        options: RelayOptions | None = None,
    ) -> None:
        self._engine = engine
        self._single = single_statements(engine)
        self._bus = bus
        self._clock = clock
        self._ids = ids
        self._random = random
        self._limits = limits
        self._options = options or RelayOptions()
        self._store_clock = StoreClock(engine, clock)
        self._waiting: deque[tuple[datetime, list[Entry]]] = deque()  # with the end of their lease
        self._confirmed: deque[UUID] = deque()
        self._to_publish = asyncio.Event()
        self._to_delete = asyncio.Event()
        self._to_sweep = asyncio.Event()
        self._supervisor = Supervisor(clock)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def failing(self) -> frozenset[str]:
        """The names of its background tasks that have failed and wait to be started again."""
        return self._supervisor.failing

    async def start(self) -> None:
        """Start publishing, and listen for sessions of this process that commit a `ServiceOutbox` message."""
        await self._store_clock.calibrate()
        self._loop = asyncio.get_running_loop()
        event.listen(Session, "after_commit", self._after_commit)
        self._supervisor.start("relay.publish", self._publish_loop)
        self._supervisor.start("relay.delete", self._delete_loop)
        self._supervisor.start("relay.sweep", self._sweep_loop)
        self._supervisor.start("relay.wake", self._wake_loop)

    async def stop(self) -> None:
        """Stop; what is not published stays in the table for others."""
        if event.contains(Session, "after_commit", self._after_commit):
            event.remove(Session, "after_commit", self._after_commit)
        await self._supervisor.stop()
        try:
            await self._delete_confirmed()  # or somebody would publish them once more
        except Exception as error:  # noqa: BLE001  # whatever it is, it must not keep the process from ending
            logger.warning("confirmed messages are not deleted: %s", error, extra={"action": "relay.not_deleted"})

    def _after_commit(self, session: Session) -> None:
        if session.in_nested_transaction():
            return  # a savepoint: nobody sees its rows yet
        if session.info.pop(ADDED, False) and self._loop is not None:
            self._loop.call_soon_threadsafe(self._to_sweep.set)  # a sync session may live in another thread

    # Outbox

    async def write(
        self,
        connection: AsyncConnection,
        messages: Sequence[Outbound],
        settling: Sequence[Delivery] = (),  # noqa: ARG002  # the bus is elsewhere: its deliveries are only acknowledged
    ) -> AfterCommit:
        """Insert `messages`, leased to this process. See `Outbox.write`."""
        if not messages:
            return _nothing
        entries = [
            Entry(
                self._ids.new(),
                message.address,
                message.bundle,
                message.encode(self._limits),
                message.envelope.traceparent,
                message.envelope.tracestate,
            )
            for message in messages
        ]
        leased_until = self._store_clock.now() + self._lease
        await insert_entries(connection, entries, due_at=leased_until)
        return lambda: self._hand_over(leased_until, entries)

    def _hand_over(self, leased_until: datetime, entries: list[Entry]) -> None:
        self._leave_unleased()  # or they would fill the memory while the bus takes nothing
        self._waiting.append((leased_until, entries))
        self._to_publish.set()

    def _leave_unleased(self) -> None:
        """Leave rows to the sweepers whose lease has ended: published from memory as well, they would go out twice."""
        now = self._store_clock.now()
        while self._waiting and self._waiting[0][0] <= now:
            self._waiting.popleft()
            self._to_sweep.set()

    # Publishing

    async def _publish_loop(self) -> None:
        while True:
            await _cleared(self._to_publish)
            await self._bus.until_writable()
            self._leave_unleased()
            entries = [entry for _, batch in self._waiting for entry in batch]
            self._waiting.clear()
            if entries:
                await self._publish(entries)

    async def _publish(self, entries: list[Entry]) -> int:
        """Publish `entries` and return how many the bus has confirmed."""
        bundles = bundled(entries, self._limits, share=self._options.share)
        await failpoint("relay.before_publish")
        errors = await self._bus.publish([bundle.outgoing() for bundle in bundles])
        await failpoint("relay.after_confirm")
        failed: list[tuple[Entry, PublishError]] = []
        for bundle, error in zip(bundles, errors, strict=True):
            if error is None:
                self._confirmed.extend(entry.id for entry in bundle.entries)
            else:
                failed.extend((entry, error) for entry in bundle.entries)
        if self._confirmed:
            self._to_delete.set()
        if failed:
            await self._keep(failed)
        return len(entries) - len(failed)

    async def _keep(self, failed: list[tuple[Entry, PublishError]]) -> None:
        """Leave rows that were not confirmed in the table for a later try."""
        now = self._store_clock.now()
        rows = []
        letters: list[tuple[Entry, DeadLetter]] = []
        patience = timedelta(seconds=self._options.unroutable_for)
        for entry, error in failed:
            if isinstance(error, UnroutableError) and age_of(entry.id, now) > patience:
                letters.append((entry, unroutable_letter(entry.body, entry.address, error, entry.attempts + 1)))
                continue
            attempts = entry.attempts + 1
            longest = min(self._options.backoff_most, self._options.backoff_first * 2 ** min(attempts, 16))
            due_at = now + timedelta(seconds=self._random.uniform(longest / 2, longest))
            rows.append((entry.id, attempts, due_at, f"{error.code}: {error}"[:1000]))
        entry, error = failed[0]
        logger.warning(
            "%d messages were not confirmed and will be published again; the first: %s to %s: %s",
            len(failed),
            entry.id,
            entry.address.key,
            error,
            extra={"action": "relay.not_confirmed", "count": len(failed)},
        )
        async with transaction(self._engine) as connection:
            await _postpone.update(connection, rows, key="id")
            await bury(connection, [letter for _, letter in letters], ids=self._ids, now=now)
            await delete_by_id(connection, outbox, [entry.id for entry, _ in letters])
        for entry, _ in letters:
            log_given_up(entry.address)

    async def _delete_loop(self) -> None:
        while True:
            if not self._confirmed:  # after an error there still are some
                await _cleared(self._to_delete)
            if self._options.delete_every:  # nobody else looks at them before their lease is over
                await self._clock.sleep(self._options.delete_every)
            await self._delete_confirmed()

    async def _delete_confirmed(self) -> None:
        ids = list(self._confirmed)
        if not ids:
            return
        await failpoint("relay.before_delete")
        async with self._single.begin() as connection:
            await delete_by_id(connection, outbox, ids)
        for _ in ids:  # only now: after an error they are deleted again
            self._confirmed.popleft()

    # Sweeping

    async def _wake_loop(self) -> None:
        while True:
            await self._clock.sleep(self._options.sweep_every)
            self._to_sweep.set()

    async def _sweep_loop(self) -> None:
        while True:
            await _cleared(self._to_sweep)
            await self.sweep()

    async def sweep(self) -> int:
        """Publish rows whose lease has run out until there are none; return how many there were.

        While the bus takes no messages this waits, and claims nothing.
        """
        total = 0
        try:
            await self._store_clock.calibrate_if_old()
            while True:
                await self._bus.until_writable()  # a row that cannot be published is claimed in vain
                if not (entries := await self._claim()):
                    break
                await failpoint("relay.claimed")
                total += len(entries)
                if await self._publish(entries) == 0:
                    break  # the bus is away: do not run through the whole table in vain
        except Exception as error:
            if is_cancelled() or not is_transient(error):
                raise
            logger.warning("the outbox cannot be read: %s", error, extra={"action": "relay.database_away"})
        return total

    async def _claim(self) -> list[Entry]:
        async with transaction(self._engine) as connection:
            if connection.dialect.name == "postgresql":
                found = await connection.execute(_CLAIM_POSTGRES, self._claim_parameters())
            else:
                found = await connection.execute(_CLAIM_SQLITE, self._claim_parameters())
            rows = found.all()
        return [
            Entry(
                row.id,
                Address(Exchange(row.exchange), row.routing_key),
                row.bundle,
                row.body,
                row.traceparent,
                row.tracestate,
                row.attempts,
            )
            for row in sorted(rows, key=lambda row: row.id.int)
        ]

    def _claim_parameters(self) -> dict[str, Any]:
        now = self._store_clock.now()
        return {"now": now, "until": now + self._lease, "most": self._options.sweep_limit}

    @property
    def _lease(self) -> timedelta:
        return timedelta(seconds=self._options.lease)


async def insert_entries(connection: AsyncConnection, entries: Sequence[Entry], *, due_at: datetime) -> None:
    """Write `entries` to the outbox; nobody else publishes them before `due_at`."""
    rows = [
        (
            entry.id,
            entry.address.exchange.value,
            entry.address.key,
            entry.bundle,
            entry.body,
            entry.traceparent,
            entry.tracestate,
            entry.attempts,
            due_at,
        )
        for entry in entries
    ]
    await _insert.insert(connection, rows)


def _nothing() -> None:
    """Nothing was written, so nothing is to be done after the commit."""


async def _cleared(event: asyncio.Event) -> None:
    """Wait for `event` and clear it before anything is read, so that a set in between is not lost."""
    await event.wait()
    event.clear()
