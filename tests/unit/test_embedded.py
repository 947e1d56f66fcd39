"""The embedded bus as outbox: what it owes to the transactions that write to it."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine

from events import embedded
from events.bus import Address, Delivery, Exchange, Outgoing, Queue
from events.clock import Clock, SystemClock
from events.codec import Limits, Readable, read_body
from events.database import open_database, transaction
from events.embedded import UNROUTABLE, EmbeddedBus
from events.embedded_queue import LARGEST_PREFETCH, PAGE
from events.envelope import Envelope
from events.errors import BusClosedError, PublishError, TooLargeError
from events.outbox import Outbound

CHARGE = Address(Exchange.COMMANDS, "charge.card")
PLACED = Address(Exchange.EVENTS, "order.placed")
PAYMENTS = Queue("payments", (CHARGE,))


class ImpatientClock(SystemClock):
    """Sleeps no longer than it takes others to run."""

    async def sleep(self, seconds: float) -> None:  # noqa: ARG002  # the port's
        await asyncio.sleep(0)


class NeverClock(SystemClock):
    """Sleeps for ever."""

    async def sleep(self, seconds: float) -> None:  # noqa: ARG002  # the port's
        await asyncio.Event().wait()


class Received:
    def __init__(self) -> None:
        self._deliveries: asyncio.Queue[Delivery] = asyncio.Queue()

    def __call__(self, delivery: Delivery) -> None:
        self._deliveries.put_nowait(delivery)

    def __len__(self) -> int:
        return self._deliveries.qsize()

    async def next(self) -> Delivery:
        async with asyncio.timeout(10):
            return await self._deliveries.get()

    async def ids(self, count: int) -> list[str]:
        """Take and acknowledge the next `count` messages."""
        ids = []
        for _ in range(count):
            delivery = await self.next()
            ids.append(envelope_id(delivery))
            await delivery.ack()
        return ids


class ForeignDelivery:
    """A delivery of another bus."""

    body = b""
    content_type: str | None = None
    content_encoding: str | None = None
    headers: Mapping[str, Any] = {}
    redelivered = False

    async def ack(self) -> None:
        """Nothing to do."""

    async def requeue(self) -> None:
        """Nothing to do."""


def outbound(id: str, address: Address = CHARGE, *, data: bytes = b"{}") -> Outbound:
    return Outbound(Envelope(id=id, source="/test", type=address.key, version=1, data=data), address)


def envelope_id(delivery: Delivery) -> str:
    [part] = read_body(
        delivery.body, content_type=delivery.content_type, headers=delivery.headers, encoding=None, limits=Limits()
    )
    assert isinstance(part, Readable)
    return part.envelope.id


async def write(bus: EmbeddedBus, *messages: Outbound, settling: Sequence[Delivery] = ()) -> None:
    async with transaction(bus._engine) as connection:
        after_commit = await bus.write(connection, messages, settling)
    after_commit()


async def stored(bus: EmbeddedBus) -> int:
    async with transaction(bus._engine) as connection:
        count: int = (await connection.exec_driver_sql("SELECT count(*) FROM embedded_message")).scalar_one()
    return count


@asynccontextmanager
async def opened(url: str, clock: Clock | None = None) -> AsyncIterator[EmbeddedBus]:
    """A bus whose process dies at the end of the block: it is not closed in good order."""
    engine = open_database(url)
    bus = EmbeddedBus(engine, clock=clock or ImpatientClock())
    await bus.open()
    await bus.declare([PAYMENTS])
    try:
        yield bus
    finally:
        await bus._supervisor.stop()
        await engine.dispose()


@pytest.fixture
async def bus(sqlite_url: str) -> AsyncIterator[EmbeddedBus]:
    async with opened(sqlite_url) as running:
        yield running


class RollbackError(Exception):
    """Ends a transaction."""


async def rolled_back(bus: EmbeddedBus, *messages: Outbound, settling: Sequence[Delivery] = ()) -> None:
    with contextlib.suppress(RollbackError):
        async with transaction(bus._engine) as connection:
            await bus.write(connection, messages, settling)
            raise RollbackError


async def test_an_open_bus_takes_messages_and_has_no_problem(sqlite_url: str) -> None:
    engine = open_database(sqlite_url)
    bus = EmbeddedBus(engine, clock=SystemClock())
    assert bus.problem == "the bus is not open"
    with pytest.raises(BusClosedError):
        await bus.until_writable()
    await bus.open()
    async with asyncio.timeout(5):
        await bus.until_writable()
    assert bus.problem is None
    await bus.close()
    await engine.dispose()


async def test_what_is_committed_is_delivered_once(bus: EmbeddedBus) -> None:
    received = Received()
    await bus.consume("payments", received, prefetch=10)
    await write(bus, outbound("a"), outbound("b"))
    assert await received.ids(2) == ["a", "b"]
    assert len(received) == 0
    assert await stored(bus) == 0


async def test_what_is_rolled_back_is_never_delivered(bus: EmbeddedBus) -> None:
    received = Received()
    await bus.consume("payments", received, prefetch=10)
    await rolled_back(bus, outbound("never"))
    await write(bus, outbound("after"))
    await rolled_back(bus, outbound("never either"))
    await write(bus, outbound("last"))
    assert await received.ids(2) == ["after", "last"]
    assert await stored(bus) == 0


async def test_nothing_is_delivered_before_the_commit(bus: EmbeddedBus) -> None:
    received = Received()
    await bus.consume("payments", received, prefetch=10)
    async with transaction(bus._engine) as connection:
        after_commit = await bus.write(connection, [outbound("a")])
        for _ in range(20):  # the background tasks have their chance
            await asyncio.sleep(0)
        assert len(received) == 0
    after_commit()
    assert await received.ids(1) == ["a"]


async def test_a_delivery_is_settled_in_the_transaction_that_handles_it(bus: EmbeddedBus) -> None:
    received = Received()
    await bus.consume("payments", received, prefetch=1)
    await write(bus, outbound("first"))
    first = await received.next()
    await write(bus, outbound("second"), settling=[first])
    assert await stored(bus) == 1
    second = await received.next()
    assert envelope_id(second) == "second"
    await first.ack()
    await first.requeue()
    await write(bus, settling=[second, ForeignDelivery()])
    assert await stored(bus) == 0
    assert len(received) == 0


async def test_a_settlement_that_is_rolled_back_leaves_the_delivery_to_be_settled_again(bus: EmbeddedBus) -> None:
    received = Received()
    await bus.consume("payments", received, prefetch=1)
    await write(bus, outbound("first"))
    first = await received.next()
    await rolled_back(bus, outbound("never"), settling=[first])
    assert await stored(bus) == 1
    await write(bus, outbound("second"), settling=[first])
    assert await received.ids(1) == ["second"]


async def test_a_delivery_whose_settlement_was_rolled_back_can_be_given_back(bus: EmbeddedBus) -> None:
    received = Received()
    await bus.consume("payments", received, prefetch=1)
    await write(bus, outbound("first"))
    first = await received.next()
    await rolled_back(bus, settling=[first])
    await first.requeue()
    again = await received.next()
    assert again.redelivered
    assert envelope_id(again) == "first"


async def test_an_event_is_stored_for_each_queue_and_not_at_all_without_one(bus: EmbeddedBus) -> None:
    await write(bus, outbound("a", PLACED))
    assert await stored(bus) == 0
    await bus.declare([Queue("mail", (PLACED,)), Queue("statistics", (PLACED,))])
    await write(bus, outbound("b", PLACED))
    assert await stored(bus) == 2
    for queue in ("mail", "statistics"):
        received = Received()
        await bus.consume(queue, received, prefetch=1)
        assert await received.ids(1) == ["b"]


async def test_a_command_that_nobody_takes_is_kept_until_somebody_does(
    bus: EmbeddedBus, caplog: pytest.LogCaptureFixture
) -> None:
    orphan = Address(Exchange.COMMANDS, "send.mail")
    received = Received()
    with caplog.at_level(logging.WARNING, "events"):
        await write(bus, outbound("a", orphan), outbound("b", orphan), outbound("other", CHARGE))
    assert [getattr(record, "action", None) for record in caplog.records] == ["bus.unroutable"] * 2
    await bus.declare([Queue("mail", (orphan,))])
    await bus.consume("mail", received, prefetch=10)
    await write(bus, outbound("c", orphan))
    assert await received.ids(3) == ["a", "b", "c"]
    leftover = Received()
    await bus.consume(UNROUTABLE, leftover, prefetch=10)
    assert await stored(bus) == 1
    assert len(leftover) == 0


async def test_a_queue_that_already_has_a_consumer_gets_what_was_kept(bus: EmbeddedBus) -> None:
    orphan = Address(Exchange.REPLIES, "coordinator")
    received = Received()
    await bus.consume("payments", received, prefetch=10)
    await write(bus, outbound("before", CHARGE), outbound("kept", orphan))
    await bus.declare([Queue("payments", (orphan,))])
    await write(bus, outbound("after", CHARGE))
    assert sorted(await received.ids(3)) == ["after", "before", "kept"]


async def test_a_backlog_larger_than_memory_is_delivered_whole_and_in_order(bus: EmbeddedBus) -> None:
    total = 3 * PAGE + 7
    for start in range(0, total, 100):
        await write(bus, *(outbound(str(number)) for number in range(start, min(start + 100, total))))
    received = Received()
    await bus.consume("payments", received, prefetch=10)
    seen: list[str] = []
    while len(seen) < total:
        assert len(bus._queues["payments"].waiting) <= PAGE
        seen += await received.ids(1)
    assert seen == [str(number) for number in range(total)]
    assert await stored(bus) == 0


async def test_memory_stays_bounded_while_a_consumer_is_slower_than_the_writers(bus: EmbeddedBus) -> None:
    total = 2 * PAGE + 50
    received = Received()
    await bus.consume("payments", received, prefetch=1)
    for number in range(total):
        await write(bus, outbound(str(number)))
        assert len(bus._queues["payments"].waiting) <= PAGE
    assert await received.ids(total) == [str(number) for number in range(total)]


async def test_callers_that_return_in_another_order_than_they_committed_lose_nothing(sqlite_url: str) -> None:
    async with opened(sqlite_url, NeverClock()) as bus:  # so that no sweep makes good what was missed
        received = Received()
        await bus.consume("payments", received, prefetch=10)
        async with transaction(bus._engine) as connection:
            first_is_committed = await bus.write(connection, [outbound("first")])
        async with transaction(bus._engine) as connection:
            second_is_committed = await bus.write(connection, [outbound("second")])
        second_is_committed()
        first_is_committed()
        assert sorted(await received.ids(2)) == ["first", "second"]
        assert len(received) == 0


async def test_what_was_rolled_back_does_not_hold_up_what_follows(sqlite_url: str) -> None:
    async with opened(sqlite_url, NeverClock()) as bus:
        received = Received()
        await bus.consume("payments", received, prefetch=10)
        await rolled_back(bus, outbound("never"))
        await write(bus, outbound("after"))
        assert await received.ids(1) == ["after"]


async def test_what_was_committed_by_a_caller_that_never_returned_is_found(bus: EmbeddedBus) -> None:
    """Its task may be cancelled between the commit and the call."""
    received = Received()
    await bus.consume("payments", received, prefetch=10)
    async with transaction(bus._engine) as connection:
        forgotten = await bus.write(connection, [outbound("a")])
    assert await received.ids(1) == ["a"]
    forgotten()
    await write(bus, outbound("b"))
    assert await received.ids(1) == ["b"]
    assert len(received) == 0


async def test_after_a_crash_only_what_was_not_settled_comes_again(sqlite_url: str) -> None:
    async with opened(sqlite_url) as bus:
        received = Received()
        await bus.consume("payments", received, prefetch=2)
        await write(bus, *(outbound(name) for name in ("acked", "settled", "held", "waiting")))
        await (await received.next()).ack()
        await write(bus, settling=[await received.next()])
        await received.next()
    async with opened(sqlite_url) as bus:
        received = Received()
        await bus.consume("payments", received, prefetch=10)
        deliveries = [await received.next() for _ in range(2)]
        assert [envelope_id(delivery) for delivery in deliveries] == ["held", "waiting"]
        assert all(delivery.redelivered for delivery in deliveries)
        await write(bus, outbound("new"))
        new = await received.next()
        assert not new.redelivered
        assert len(received) == 0


async def test_queues_and_bindings_outlive_the_process(sqlite_url: str) -> None:
    async with opened(sqlite_url) as bus:
        await bus.declare([Queue("mail", (PLACED, Address(Exchange.EVENTS, "user.*")))])
    engine = open_database(sqlite_url)
    bus = EmbeddedBus(engine, clock=ImpatientClock())
    await bus.open()
    assert not any(await bus.publish([Outgoing(CHARGE, b"[1]"), Outgoing(PLACED, b"[2]")]))
    await write(bus, outbound("a", Address(Exchange.EVENTS, "user.registered")))
    assert await stored(bus) == 3
    await bus.close()
    await engine.dispose()


async def test_a_delivery_from_before_a_close_settles_nothing(bus: EmbeddedBus) -> None:
    received = Received()
    await bus.consume("payments", received, prefetch=1)
    await write(bus, outbound("a"))
    stale = await received.next()
    await bus.close()
    await bus.open()
    await write(bus, settling=[stale])
    await stale.ack()
    assert await stored(bus) == 1


async def test_a_message_that_is_too_large_is_refused_and_the_transaction_goes_on(bus: EmbeddedBus) -> None:
    received = Received()
    await bus.consume("payments", received, prefetch=10)
    async with transaction(bus._engine) as connection:
        with pytest.raises(TooLargeError):
            await bus.write(connection, [outbound("small"), outbound("large", data=b'"' + b"x" * 300_000 + b'"')])
        after_commit = await bus.write(connection, [outbound("instead")])
    after_commit()
    assert await received.ids(1) == ["instead"]
    assert await stored(bus) == 0


async def test_a_lone_hop_adds_two_statements_to_the_transaction(bus: EmbeddedBus) -> None:
    received = Received()
    await bus.consume("payments", received, prefetch=1)
    await write(bus, outbound("first"))
    delivery = await received.next()
    statements: list[str] = []
    async with transaction(bus._engine) as connection:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        raw._conn.set_trace_callback(statements.append)
        after_commit = await bus.write(connection, [outbound("second")], [delivery])
        raw._conn.set_trace_callback(None)
    after_commit()
    assert [statement.split()[0] for statement in statements] == ["INSERT", "DELETE"]


async def test_an_acknowledgement_that_the_database_refuses_brings_the_message_again(
    bus: EmbeddedBus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    received = Received()
    await bus.consume("payments", received, prefetch=1)
    await write(bus, outbound("a"))
    delivery = await received.next()

    async def disk_full(*_: Any) -> None:
        raise OperationalError("DELETE", None, Exception("disk full"))

    with monkeypatch.context() as broken, caplog.at_level(logging.CRITICAL + 1):
        broken.setattr(embedded, "execute_many", disk_full)
        await delivery.ack()
        again = await received.next()
    assert again.redelivered
    await again.ack()
    assert await stored(bus) == 0


async def test_a_publish_that_the_database_refuses_is_an_error_for_each_message(
    bus: EmbeddedBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def disk_full(*_: Any) -> None:
        raise OperationalError("INSERT", None, Exception("disk full"))

    with monkeypatch.context() as broken:
        broken.setattr(embedded, "execute_many", disk_full)
        errors = await bus.publish([Outgoing(CHARGE, b"[1]"), Outgoing(CHARGE, b"[2]")])
    assert [type(error) for error in errors] == [PublishError, PublishError]
    received = Received()
    await bus.consume("payments", received, prefetch=1)
    await write(bus, outbound("after"))
    assert await received.ids(1) == ["after"]


async def test_a_broken_statement_is_a_database_error_like_any_other(bus: EmbeddedBus) -> None:
    async with transaction(bus._engine) as connection:
        await connection.exec_driver_sql("DROP TABLE embedded_message")
    with pytest.raises(OperationalError, match="no such table"):
        await write(bus, outbound("a"))


async def test_writing_to_a_closed_bus_says_so(bus: EmbeddedBus) -> None:
    await bus.close()
    with pytest.raises(BusClosedError):
        await write(bus, outbound("a"))


async def test_closing_waits_for_nobody_who_acknowledges(bus: EmbeddedBus) -> None:
    received = Received()
    await bus.consume("payments", received, prefetch=1)
    await write(bus, outbound("a"))
    delivery = await received.next()
    engine: AsyncEngine = bus._engine
    async with transaction(engine):  # the only connection is taken, so the acknowledgement must wait
        acknowledging = asyncio.create_task(delivery.ack())
        await asyncio.sleep(0)
        closing = asyncio.create_task(bus.close())
        async with asyncio.timeout(10):
            await acknowledging
            await closing


async def test_after_a_restart_only_what_may_have_been_delivered_is_marked_as_redelivered(sqlite_url: str) -> None:
    """A backlog that nobody had seen is not treated as if it had killed the process."""
    async with opened(sqlite_url) as bus:
        await bus.declare([PAYMENTS])
        await write(bus, *(outbound(str(number)) for number in range(400)))
        received = Received()
        await bus.consume("payments", received, prefetch=16)
        await received.ids(50)
    async with opened(sqlite_url) as bus:
        await bus.declare([PAYMENTS])
        received = Received()
        await bus.consume("payments", received, prefetch=16)
        marks = []
        for _ in range(350):
            delivery = await received.next()
            marks.append(delivery.redelivered)
            await delivery.ack()
    assert all(marks[:16]), "what was delivered and not acknowledged comes first"
    assert marks == sorted(marks, reverse=True)
    assert sum(marks) == LARGEST_PREFETCH
