"""The bus without a server: queues kept in the store's own SQLite file, for one process.

What a transaction sends is a row per bound queue in that transaction, and what it has handled is deleted in it, so
a message costs no commit of its own. After the commit the rows go to the consumers straight from memory; the
table is read only when a queue holds more than memory should, and after a restart. SQLite has one writer, so ids
given in memory grow in the order of the commits.
"""

import asyncio
import logging
import re
from collections.abc import Iterable, Sequence

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from events.bus import DEAD_LETTERS, Address, Consumer, Deliver, Delivery, Exchange, Outgoing, Queue
from events.clock import Clock
from events.codec import Limits, bundle_body
from events.database import transaction
from events.embedded_queue import LARGEST_PREFETCH, PAGE, EmbeddedConsumer, EmbeddedDelivery, EmbeddedQueue, EmbeddedRow
from events.errors import BusClosedError, ConfigurationError, PublishError, UnroutableError
from events.outbox import AfterCommit, Outbound
from events.service import Supervisor
from events.sqlite import execute_many

UNROUTABLE = "unroutable"

_log = logging.getLogger(__name__)
_SWEEP_PAUSE = 1.0
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS embedded_queue (name TEXT PRIMARY KEY) WITHOUT ROWID",
    """
    CREATE TABLE IF NOT EXISTS embedded_binding (
        queue TEXT NOT NULL, exchange TEXT NOT NULL, routing_key TEXT NOT NULL,
        PRIMARY KEY (queue, exchange, routing_key)
    ) WITHOUT ROWID
    """,
    """
    CREATE TABLE IF NOT EXISTS embedded_message (
        id INTEGER PRIMARY KEY,
        queue TEXT NOT NULL, exchange TEXT NOT NULL, routing_key TEXT NOT NULL, body BLOB NOT NULL
    )
    """,
    "CREATE INDEX IF NOT EXISTS ix_embedded_message_queue ON embedded_message (queue)",
)
_INSERT = "INSERT INTO embedded_message (id, queue, exchange, routing_key, body) VALUES (?, ?, ?, ?, ?)"
_DELETE = "DELETE FROM embedded_message WHERE id = ?"
_READ = "SELECT id, body FROM embedded_message WHERE queue = ? AND id > ? ORDER BY id LIMIT ?"
_RESTORED = "SELECT coalesce(max(id), 0) FROM (SELECT id FROM embedded_message WHERE queue = ? ORDER BY id LIMIT ?)"
_COPY = """
    INSERT INTO embedded_message (id, queue, exchange, routing_key, body)
    SELECT ?, ?, exchange, routing_key, body FROM embedded_message WHERE id = ?
"""
_ROUTE_AGAIN = """
    INSERT INTO embedded_message (id, queue, exchange, routing_key, body)
    SELECT ? + row_number() OVER (ORDER BY id), ?, exchange, routing_key, body
    FROM embedded_message WHERE queue = ? AND exchange = ? AND routing_key = ?
"""
_DELETE_ROUTED = "DELETE FROM embedded_message WHERE queue = ? AND exchange = ? AND routing_key = ?"


class EmbeddedBus:
    """A bus and its outbox in one SQLite file.

    Args:
        engine: the engine of the store, made by `open_database`; it has a single connection.
        clock: paces the background tasks.
        limits: the largest message that is stored.
    """

    def __init__(self, engine: AsyncEngine, *, clock: Clock, limits: Limits | None = None) -> None:
        self._engine = engine
        self._clock = clock
        self._limits = limits or Limits()
        self._supervisor = Supervisor(clock)
        self._is_open = False
        self._last_id = 0
        self._queues: dict[str, EmbeddedQueue] = {}
        self._bindings: dict[Address, list[EmbeddedQueue]] = {}
        self._patterns: list[tuple[re.Pattern[str], EmbeddedQueue]] = []
        self._acknowledged: list[tuple[EmbeddedDelivery, asyncio.Future[None]]] = []
        self._buried: list[EmbeddedDelivery] = []
        self._to_do = asyncio.Event()
        self._to_sweep = asyncio.Event()
        self.epoch = 0  # counts `close()`: deliveries from before one are void

    # Bus

    async def open(self) -> None:
        """Make the tables exist and pick up what they hold.

        What a consumer may have had is delivered as `redelivered`: the oldest messages of each queue, since they are
        handed out in order, and a consumer holds no more than its prefetch.
        """
        if self._is_open:
            return
        async with transaction(self._engine) as connection:
            for statement in _SCHEMA:
                await connection.exec_driver_sql(statement)
            self._last_id = (
                await connection.exec_driver_sql("SELECT coalesce(max(id), 0) FROM embedded_message")
            ).scalar_one()
            names = (await connection.exec_driver_sql("SELECT name FROM embedded_queue")).scalars().all()
            bindings = (
                await connection.exec_driver_sql("SELECT queue, exchange, routing_key FROM embedded_binding")
            ).all()
            restored = {
                name: (await connection.exec_driver_sql(_RESTORED, (name, LARGEST_PREFETCH))).scalar_one()
                for name in {UNROUTABLE, DEAD_LETTERS, *names}
            }
        self._queues = {
            name: EmbeddedQueue(name, written=self._last_id, restored=last) for name, last in restored.items()
        }
        for row in bindings:
            self._bind(self._queues[row.queue], Address(Exchange(row.exchange), row.routing_key))
        self._is_open = True
        self._supervisor.start("embedded.keep", self._keep)
        self._supervisor.start("embedded.sweep", self._sweep)

    async def close(self) -> None:
        """Stop delivering. What is unacknowledged comes again after the next `open()`. Closing twice is fine."""
        self._is_open = False
        self.epoch += 1
        await self._supervisor.stop()
        for _, done in self._acknowledged:
            _resolve(done)
        self._acknowledged.clear()
        self._buried.clear()
        self._queues.clear()
        self._bindings.clear()
        self._patterns.clear()

    async def declare(self, queues: Sequence[Queue]) -> None:
        """Make queues and bindings exist. Commands and replies that had no receiver go to those they have now."""
        self._require_open()
        async with transaction(self._engine) as connection:
            for declared in queues:
                await connection.exec_driver_sql("INSERT OR IGNORE INTO embedded_queue VALUES (?)", (declared.name,))
                queue = self._queues.setdefault(declared.name, EmbeddedQueue(declared.name))
                for address in declared.bindings:
                    key = (address.exchange.value, address.key)
                    await connection.exec_driver_sql(
                        "INSERT OR IGNORE INTO embedded_binding VALUES (?, ?, ?)", (declared.name, *key)
                    )
                    # Nobody else can write before this commits, so all see the binding from the same message on.
                    self._bind(queue, address)
                    if not address.exchange.mandatory:
                        continue
                    moved = await connection.exec_driver_sql(
                        _ROUTE_AGAIN, (self._last_id, declared.name, UNROUTABLE, *key)
                    )
                    if moved.rowcount > 0:
                        self._last_id += moved.rowcount
                        queue.written = self._last_id
                        queue.unread = True
                        await connection.exec_driver_sql(_DELETE_ROUTED, (UNROUTABLE, *key))
        self.wake()

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        """Store `messages` in one transaction of their own. See `Bus.publish`."""
        self._require_open()
        results: list[PublishError | None] = []
        routed: list[tuple[Address, bytes, Sequence[EmbeddedQueue]]] = []
        for message in messages:
            targets = self._targets(message.address)
            unroutable = not targets and message.address.exchange.mandatory
            results.append(_unroutable(message.address) if unroutable else None)
            routed.append((message.address, message.body, targets))
        if not any(targets for _, _, targets in routed):
            return results
        try:
            async with transaction(self._engine) as connection:
                after_commit = await self._store(connection, routed, ())
        except (SQLAlchemyError, TimeoutError) as error:
            failure = PublishError(f"the message could not be stored: {error}")
            return [result or failure for result in results]
        after_commit()
        return results

    async def until_writable(self) -> None:
        """See `Bus.until_writable`. An open file always takes messages."""
        self._require_open()

    @property
    def problem(self) -> str | None:
        """See `Bus.problem`."""
        return None if self._is_open else "the bus is not open"

    async def consume(self, queue: str, deliver: Deliver, *, prefetch: int) -> Consumer:
        """See `Bus.consume`. After 20 failures of `deliver` a message goes to `DEAD_LETTERS`."""
        self._require_open()
        if (source := self._queues.get(queue)) is None:
            raise ConfigurationError(f"queue {queue!r} is not declared; call declare() first")
        consumer = EmbeddedConsumer(self, source, deliver, prefetch=prefetch)
        source.consumers.append(consumer)
        self.wake()
        return consumer

    # Outbox

    async def write(
        self, connection: AsyncConnection, messages: Sequence[Outbound], settling: Sequence[Delivery] = ()
    ) -> AfterCommit:
        """Put `messages` into their queues and remove `settling` from theirs. See `Outbox.write`.

        A command or reply that no queue takes is kept in the queue `UNROUTABLE` until one does.
        """
        self._require_open()
        routed: list[tuple[Address, bytes, Sequence[EmbeddedQueue]]] = []
        for message in messages:
            body = bundle_body([message.encode(self._limits)])
            targets = self._targets(message.address)
            if not targets and message.address.exchange.mandatory:
                _log.warning(
                    "no queue takes %s %s; it is kept until one does",
                    message.address.exchange.value,
                    message.address.key,
                    extra={"action": "bus.unroutable", "routing_key": message.address.key},
                )
                targets = [self._queues[UNROUTABLE]]
            routed.append((message.address, body, targets))
        return await self._store(connection, routed, settling)

    # For deliveries

    async def acknowledge(self, delivery: EmbeddedDelivery) -> None:
        """Delete the row of `delivery`, together with all others that are acknowledged at the time."""
        done = asyncio.get_running_loop().create_future()
        self._acknowledged.append((delivery, done))
        self.wake()
        await done

    def bury(self, delivery: EmbeddedDelivery) -> None:
        """Move the row of `delivery` to the dead letters."""
        self._buried.append(delivery)
        self.wake()

    def wake(self) -> None:
        """Have the background task look at all queues."""
        self._to_do.set()

    # Inside

    def _require_open(self) -> None:
        if not self._is_open:
            raise BusClosedError

    def _bind(self, queue: EmbeddedQueue, address: Address) -> None:
        if address.exchange is Exchange.EVENTS and ("*" in address.key or "#" in address.key):
            pattern = _topic_pattern(address.key)
            if (pattern, queue) not in self._patterns:
                self._patterns.append((pattern, queue))
        elif queue not in (bound := self._bindings.setdefault(address, [])):
            bound.append(queue)

    def _targets(self, address: Address) -> Sequence[EmbeddedQueue]:
        exact = self._bindings.get(address, ())
        if not self._patterns or address.exchange is not Exchange.EVENTS:
            return exact
        matching = [queue for pattern, queue in self._patterns if pattern.fullmatch(address.key)]
        return list(dict.fromkeys([*exact, *matching]))

    def _next_id(self, queue: EmbeddedQueue) -> tuple[int, int]:
        """Return a new row's id and the id of the row before it in `queue`."""
        self._last_id += 1
        previous, queue.written = queue.written, self._last_id
        return self._last_id, previous

    async def _store(
        self,
        connection: AsyncConnection,
        routed: Iterable[tuple[Address, bytes, Sequence[EmbeddedQueue]]],
        settling: Sequence[Delivery],
    ) -> AfterCommit:
        inserts: list[tuple[int, str, str, str, bytes]] = []
        taken: list[tuple[EmbeddedQueue, EmbeddedRow, int]] = []
        for address, body, targets in routed:
            for queue in targets:
                row_id, previous = self._next_id(queue)
                inserts.append((row_id, queue.name, address.exchange.value, address.key, body))
                taken.append((queue, EmbeddedRow(row_id, body, redelivered=False), previous))
        leaving = [delivery for delivery in settling if isinstance(delivery, EmbeddedDelivery) and delivery.is_open]
        await execute_many(connection, _INSERT, inserts)
        await execute_many(connection, _DELETE, [(delivery.row.id,) for delivery in leaving])
        self._to_sweep.set()
        epoch = self.epoch

        def after_commit() -> None:
            if epoch != self.epoch:
                return
            for delivery in leaving:
                delivery.settle()
            for queue, row, previous in taken:
                queue.take(row, previous)
            for queue in {queue for queue, _, _ in taken}.union(delivery.consumer.queue for delivery in leaving):
                queue.hand_out()
                if queue.lacks_rows:
                    self.wake()

        return after_commit

    async def _keep(self) -> None:
        """Do what needs the database and belongs to no caller's transaction."""
        while True:
            await self._to_do.wait()
            self._to_do.clear()
            for queue in self._queues.values():
                queue.hand_out()
            acknowledged, self._acknowledged = self._acknowledged, []
            buried, self._buried = self._buried, []
            hungry = [queue for queue in self._queues.values() if queue.lacks_rows]
            if not acknowledged and not buried and not hungry:
                continue
            try:
                await self._settle_and_read([delivery for delivery, _ in acknowledged], buried, hungry)
            except BaseException:
                for delivery in (*(delivery for delivery, _ in acknowledged), *buried):
                    if delivery.is_open:
                        delivery.give_back()
                raise
            finally:
                for _, done in acknowledged:
                    _resolve(done)
                self.wake()

    async def _settle_and_read(
        self,
        acknowledged: Sequence[EmbeddedDelivery],
        buried: Sequence[EmbeddedDelivery],
        hungry: Sequence[EmbeddedQueue],
    ) -> None:
        dead_letters = self._queues[DEAD_LETTERS]
        async with self._engine.connect() as connection:
            for queue in hungry:
                found = (await connection.exec_driver_sql(_READ, (queue.name, queue.cursor, PAGE))).all()
                queue.waiting.extend(
                    EmbeddedRow(row.id, row.body, redelivered=row.id <= queue.restored) for row in found
                )
                # The only connection is ours for the moment, so no row up to `written` can appear any more.
                queue.unread = len(found) == PAGE
                queue.cursor = found[-1].id if queue.unread else queue.written
            if acknowledged or buried:
                copies = [(self._next_id(dead_letters)[0], DEAD_LETTERS, delivery.row.id) for delivery in buried]
                deletes = [(delivery.row.id,) for delivery in (*acknowledged, *buried)]
                await execute_many(connection, _COPY, copies)
                await execute_many(connection, _DELETE, deletes)
                await connection.commit()
                dead_letters.unread |= bool(buried)
        for delivery in (*acknowledged, *buried):
            delivery.settle()

    async def _sweep(self) -> None:
        """Find what was committed by callers who were cancelled before they could say so."""
        while True:
            await self._to_sweep.wait()
            self._to_sweep.clear()
            await self._clock.sleep(_SWEEP_PAUSE)
            for queue in self._queues.values():
                queue.unread |= queue.cursor < queue.written
            self.wake()


def _unroutable(address: Address) -> UnroutableError:
    return UnroutableError(
        f"no queue takes {address.exchange.value} {address.key}; start the service whose handler receives it"
    )


def _resolve(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _topic_pattern(key: str) -> re.Pattern[str]:
    """Return what an AMQP topic binding matches: `*` is one word, `#` any number of them."""
    words = [{"*": r"[^.]*", "#": r".*"}.get(word, re.escape(word)) for word in key.split(".")]
    pattern = r"\.".join(words).replace(r"\..*", r"(?:\..*)?").replace(r".*\.", r"(?:.*\.)?")
    return re.compile(pattern)
