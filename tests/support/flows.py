"""What tests of handlers, relay and outbox share: a clock that only they move, a bus in memory, a stage to act on."""

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from dishka import AsyncContainer
from sqlalchemy import Column, Integer, MetaData, Row, Table, Text, func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from events.bus import Address, Bus, Deliver, Delivery, Exchange, Outgoing, Queue
from events.clock import SystemClock
from events.codec import BATCH_TYPE, Limits, Readable, bundle_body, read_body
from events.database import open_database, transaction
from events.embedded import EmbeddedBus
from events.envelope import Direction, Envelope, SagaLink, wrap
from events.errors import PublishError
from events.ids import TimeOrderedIds
from events.message import Command, Event, Reply
from events.outbox import Outbox, route
from events.rabbitmq import RabbitMQBus
from events.registry import Registry
from events.relay import Relay, RelayOptions
from events.tables import dead_letter, metadata, outbox
from handlers.definition import Handler
from handlers.fence import Fence
from handlers.group import HandlerGroup
from handlers.keys import KeyLocks
from handlers.operations import Operations
from handlers.retries import Retries
from handlers.tables import inbox, retry
from handlers.tools import Tools

PATIENCE = 60  # seconds before a test gives up on something that must happen
START = datetime(2026, 1, 1, tzinfo=UTC)
REPLY_TO = "tests"
SOURCE = "/tests"

tables = MetaData()
effects = Table("effect", tables, Column("number", Integer, primary_key=True), Column("what", Text, nullable=False))


class ChargeCard(Command):
    order: str


class RefundCard(Command):
    order: str


class OrderPlaced(Event):
    order: str


class PaymentCaptured(Event):
    order: str


class PaymentFailed(Event):
    order: str


class Charged(Reply):
    charge: str


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Look again and again, letting all others run in between."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110  # a database tells nobody that it has changed
            await asyncio.sleep(0)


class ManualClock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._sleepers: list[tuple[float, int, float, asyncio.Future[None]]] = []
        self._changed = asyncio.Event()
        self.sleeps = 0

    def now(self) -> datetime:
        return START + timedelta(seconds=self._elapsed)

    def monotonic(self) -> float:
        return self._elapsed

    async def sleep(self, seconds: float) -> None:
        self.sleeps += 1
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._elapsed + seconds, self.sleeps, seconds, wake))
        self._changed.set()
        await wake

    def advance(self, seconds: float) -> None:
        """Let time pass, and wake who has slept long enough."""
        self._elapsed += seconds
        while self._sleepers and self._sleepers[0][0] <= self._elapsed:
            *_, wake = heapq.heappop(self._sleepers)
            if not wake.done():
                wake.set_result(None)

    async def asleep(self, seconds: float) -> None:
        """Return when somebody sleeps for just `seconds`."""
        async with asyncio.timeout(PATIENCE):
            while not any(asked == seconds and not wake.done() for _, _, asked, wake in self._sleepers):
                self._changed.clear()
                await self._changed.wait()

    async def pass_sleep(self, seconds: float) -> None:
        """Wait until somebody sleeps for just `seconds`, then let them pass."""
        await self.asleep(seconds)
        self.advance(seconds)


class Longest:
    """No randomness: always the upper bound."""

    def uniform(self, low: float, high: float) -> float:  # noqa: ARG002  # the port's
        return high


class FakeDelivery:
    """A delivery made by hand; counts what is done to it."""

    def __init__(
        self,
        body: bytes,
        *,
        content_type: str | None = BATCH_TYPE,
        content_encoding: str | None = None,
        headers: Mapping[str, Any] | None = None,
        redelivered: bool = False,
    ) -> None:
        self.body = body
        self.content_type = content_type
        self.content_encoding = content_encoding
        self.headers: Mapping[str, Any] = headers or {}
        self.redelivered = redelivered
        self.acks = 0
        self.requeues = 0

    async def ack(self) -> None:
        self.acks += 1

    async def requeue(self) -> None:
        self.requeues += 1


class FakeConsumer:
    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel

    async def cancel(self) -> None:
        self._cancel()


class FakeBus:
    """A bus in memory. Keeps every attempt to publish, and confirms or refuses as `answer` says."""

    def __init__(self) -> None:
        self.attempts: list[Outgoing] = []
        self.published: list[Outgoing] = []
        self.deliveries: list[FakeDelivery] = []
        self.problem: str | None = None
        self.writable = asyncio.Event()
        self.writable.set()
        self.answer: Callable[[Outgoing], PublishError | None] = lambda _: None
        self._queues: dict[str, Queue] = {}
        self._waiting: dict[str, deque[FakeDelivery]] = {}
        self._delivered: dict[str, list[FakeDelivery]] = {}
        self._consumers: dict[str, Deliver] = {}
        self._changed = asyncio.Event()

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Take back what is not acknowledged."""
        self._consumers.clear()
        for name, delivered in self._delivered.items():
            back = [
                FakeDelivery(each.body, headers=each.headers, redelivered=True) for each in delivered if not each.acks
            ]
            self._waiting[name].extendleft(reversed(back))
            delivered.clear()

    async def declare(self, queues: Sequence[Queue]) -> None:
        for queue in queues:
            self._queues[queue.name] = queue
            self._waiting.setdefault(queue.name, deque())
            self._delivered.setdefault(queue.name, [])

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        results = []
        for message in messages:
            self.attempts.append(message)
            error = self.answer(message)
            results.append(error)
            if error is None:
                self.published.append(message)
                for queue in self._queues.values():
                    if message.address in queue.bindings:
                        self.put(queue.name, FakeDelivery(message.body))
        self._changed.set()
        return results

    async def until_writable(self) -> None:
        await self.writable.wait()

    async def consume(self, queue: str, deliver: Deliver, *, prefetch: int) -> FakeConsumer:  # noqa: ARG002  # no limit
        self._consumers[queue] = deliver
        waiting = self._waiting[queue]
        while waiting:
            self._hand_out(queue, waiting.popleft())
        return FakeConsumer(lambda: self._consumers.pop(queue, None) and None)

    def put(self, queue: str, *deliveries: FakeDelivery) -> None:
        """Deliver to the queue's consumer, all before it can do anything; or keep for the next one."""
        for delivery in deliveries:
            if queue in self._consumers:
                self._hand_out(queue, delivery)
            else:
                self._waiting[queue].append(delivery)

    def unsettled(self, queue: str) -> int:
        return len(self._waiting[queue]) + sum(not delivery.acks for delivery in self._delivered[queue])

    async def seen(self, count: int, *, attempts: bool = False) -> None:
        """Return when `count` messages were published, or tried to be."""
        async with asyncio.timeout(PATIENCE):
            while len(self.attempts if attempts else self.published) < count:
                self._changed.clear()
                await self._changed.wait()

    def _hand_out(self, queue: str, delivery: FakeDelivery) -> None:
        self._delivered[queue].append(delivery)
        self.deliveries.append(delivery)
        self._consumers[queue](delivery)


def envelopes(body: bytes) -> list[Envelope]:
    """Return what a bundle holds."""
    parts = read_body(body, content_type=BATCH_TYPE, headers={}, encoding=None, limits=Limits())
    return [part.envelope for part in parts if isinstance(part, Readable)]


def enveloped(message: Command | Event, *, id: str | None = None, saga: SagaLink | None = None) -> Envelope:
    """Return `message` as somebody else would send it; as a saga's command where `saga` is given."""
    return wrap(
        message,
        id=id or str(uuid4()),
        source=SOURCE,
        time=START,
        saga=saga,
        reply_to=REPLY_TO if saga else None,
    )


def link(saga_id: UUID | None = None) -> SagaLink:
    return SagaLink(saga_id or uuid4(), "charge", Direction.DO, 1)


class Mailbox:
    """Takes what a queue delivers, acknowledges it, and keeps the envelopes in order."""

    def __init__(self) -> None:
        self._envelopes: asyncio.Queue[Envelope] = asyncio.Queue()
        self._settling: set[asyncio.Task[None]] = set()

    def __call__(self, delivery: Delivery) -> None:
        task = asyncio.ensure_future(delivery.ack())
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        for envelope in envelopes(delivery.body):
            self._envelopes.put_nowait(envelope)

    def __len__(self) -> int:
        return self._envelopes.qsize()

    async def next(self) -> Envelope:
        async with asyncio.timeout(PATIENCE):
            return await self._envelopes.get()


class Stage:
    """A database, a bus and an outbox on which handlers run, and two queues that see what they say."""

    def __init__(self, engine: AsyncEngine, bus: Bus, clock: ManualClock) -> None:
        self.engine = engine
        self.bus = bus
        self.clock = clock
        self.ids = TimeOrderedIds()
        self.relay = make_relay(engine, bus, clock)
        self.outbox: Outbox = bus if isinstance(bus, EmbeddedBus) else self.relay
        self.replies = Mailbox()
        self.events = Mailbox()
        self.commands: set[str] = set()  # types of those that are handled here, for the fence
        self.retries = Retries(engine, clock=clock, ids=self.ids)
        self._groups: list[HandlerGroup] = []

    async def open(self) -> None:
        async with transaction(self.engine) as connection:
            await connection.run_sync(metadata.create_all)
            await connection.run_sync(tables.create_all)
        await self._open_bus()
        await self.relay.start()

    async def close(self) -> None:
        for group in self._groups:
            await group.stop(0)
        await self.relay.stop()
        await self.bus.close()

    async def restart(self) -> None:
        """The process dies and another one starts, without its handlers."""
        await self.close()
        self._groups.clear()
        await self._open_bus()
        await self.relay.start()

    async def start(
        self, *handlers: Handler, container: AsyncContainer | None = None, limits: Limits | None = None
    ) -> HandlerGroup:
        """Run `handlers` in a process of their own."""
        tools = Tools(
            engine=self.engine,
            bus=self.bus,
            outbox=self.outbox,
            container=container,
            clock=self.clock,
            ids=self.ids,
            random=Longest(),
            limits=limits or Limits(),
            fence=Fence(frozenset(self.commands)),
            retries=self.retries,
            keys=KeyLocks(self.engine, clock=SystemClock(), random=Longest()),
        )
        registry = Registry(list(dict.fromkeys(handler.message for handler in handlers)))
        group = HandlerGroup(handlers, registry=registry, source="/tests", tools=tools)
        await self.bus.declare([handler.queue for handler in handlers])
        await group.start()
        self._groups.append(group)
        return group

    async def pause(self, group: HandlerGroup, name: str, *, paused: bool = True) -> None:
        """Pause a handler or let it go on, as an operator does, and wait until its process has followed."""
        operations = Operations(self.engine, ids=self.ids)
        await operations.change(name, by="ada", reason="a test", now=self.clock.now(), paused=paused)

        async def has_followed() -> bool:
            return group.runners[name].flow.is_open is not paused

        await self.clock.pass_sleep(1.0)
        await until(has_followed)

    async def send(self, *sent: Envelope, exchange: Exchange = Exchange.COMMANDS) -> None:
        """Publish envelopes of one type in one bundle."""
        await self.send_raw(sent[0].type, bundle_body([each.encode() for each in sent]), exchange=exchange)

    async def send_raw(self, key: str, body: bytes, *, exchange: Exchange = Exchange.COMMANDS) -> None:
        [error] = await self.bus.publish([Outgoing(Address(exchange, key), body)])
        assert error is None

    async def effects(self) -> list[str]:
        async with transaction(self.engine) as connection:
            return list((await connection.execute(select(effects.c.what).order_by(effects.c.number))).scalars())

    async def handled(self) -> list[Row[Any]]:
        return await self._rows(inbox)

    async def dead(self) -> list[Row[Any]]:
        return await self._rows(dead_letter)

    async def waiting(self) -> list[Row[Any]]:
        return await self._rows(retry)

    async def unsent(self) -> list[Row[Any]]:
        return await self._rows(outbox)

    async def dead_letters(self, count: int) -> list[Row[Any]]:
        """Wait for `count` dead letters."""

        async def enough() -> bool:
            return len(await self.dead()) >= count

        await until(enough)
        return await self.dead()

    async def delayed(self, attempts: int) -> Row[Any]:
        """Wait until a message has been tried so often and waits for its next try; return its row."""
        found: list[Row[Any]] = []

        async def is_there() -> bool:
            found[:] = [row for row in await self.waiting() if row.attempts == attempts and row.begun_at is None]
            return bool(found)

        await until(is_there)
        return found[0]

    async def pass_delay(self, attempts: int, seconds: float) -> None:
        """Wait until a message has been tried so often, see that it waits for `seconds`, and let them pass."""
        row = await self.delayed(attempts)
        assert abs((row.due_at - self.retries.clock.now()).total_seconds() - seconds) < 1
        self.clock.advance(seconds)

    async def settled(self, handler: Handler) -> None:
        """Wait until nothing in the handler's queue is left to be acknowledged."""

        async def empty() -> bool:
            return await self.unsettled(handler) == 0

        await until(empty)

    async def unsettled(self, handler: Handler) -> int:
        """Count what is in the handler's queue, delivered or not."""
        if isinstance(self.bus, FakeBus):
            return self.bus.unsettled(handler.queue.name)
        async with transaction(self.engine) as connection:
            statement = "SELECT count(*) FROM embedded_message WHERE queue = ?"
            count: int = (await connection.exec_driver_sql(statement, (handler.queue.name,))).scalar_one()
        return count

    async def _open_bus(self) -> None:
        await self.bus.open()
        addresses = tuple(route(kind(order="")) for kind in (PaymentCaptured, PaymentFailed))
        await self.bus.declare(
            [Queue("saga", (Address(Exchange.REPLIES, REPLY_TO),)), Queue("witness", addresses)],
        )
        await self.bus.consume("saga", self.replies, prefetch=100)
        await self.bus.consume("witness", self.events, prefetch=100)

    async def _rows(self, table: Table) -> list[Row[Any]]:
        async with transaction(self.engine) as connection:
            return list((await connection.execute(table.select())).all())


@asynccontextmanager
async def open_stage(database_url: str, *, embedded: bool = False, amqp_url: str | None = None) -> AsyncIterator[Stage]:
    """A stage over a database; the bus is in memory, in the SQLite file, or a RabbitMQ server."""
    clock = ManualClock()
    engine = open_database(database_url, pool_size=16)  # as a process has it: handlers need some at the same time
    bus: Bus = FakeBus()
    if embedded:
        bus = EmbeddedBus(engine, clock=clock)
    elif amqp_url:
        bus = RabbitMQBus(amqp_url, application="tests", clock=SystemClock(), ids=TimeOrderedIds())
    stage = Stage(engine, bus, clock)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.dispose)
        await stage.open()
        stack.push_async_callback(stage.close)
        yield stage


def bodies(rows: Iterable[Row[Any]]) -> list[bytes]:
    return [row.body for row in rows]


@asynccontextmanager
async def open_store(url: str) -> AsyncIterator[AsyncEngine]:
    """A database with its tables."""
    engine = open_database(url)
    try:
        async with transaction(engine) as connection:
            await connection.run_sync(metadata.create_all)
            await connection.run_sync(tables.create_all)
        yield engine
    finally:
        await engine.dispose()


async def count_rows(engine: AsyncEngine, table: Table) -> int:
    async with transaction(engine) as connection:
        count: int = (await connection.execute(select(func.count()).select_from(table))).scalar_one()
    return count


def make_relay(
    engine: AsyncEngine,
    bus: Bus,
    clock: ManualClock,
    *,
    options: RelayOptions | None = None,
    limits: Limits | None = None,
    delete_every: float = 0,
) -> Relay:
    return Relay(
        engine,
        bus,
        clock=clock,
        ids=TimeOrderedIds(),
        random=Longest(),
        limits=limits or Limits(),
        options=replace(options or RelayOptions(), delete_every=delete_every),
    )
