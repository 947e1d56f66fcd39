"""The relay on both databases: what is committed is published, and nothing is forgotten before it is confirmed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from sqlalchemy import Row, Table, event
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from events import relay as relay_module
from events.bulk import delete_by_id
from events.bus import Address, Exchange, Outgoing, Queue
from events.clock import SystemClock
from events.codec import Limits
from events.database import transaction
from events.envelope import Envelope
from events.errors import InvalidMessageError, PublishError, TooLargeError, UnroutableError
from events.failpoints import armed
from events.ids import TimeOrderedIds
from events.outbox import Outbound
from events.rabbitmq import RabbitMQBus
from events.relay import Relay, RelayOptions
from events.tables import outbox
from tests.support.flows import (
    PATIENCE,
    FakeBus,
    Mailbox,
    ManualClock,
    count_rows,
    envelopes,
    make_relay,
    open_store,
    until,
)

CHARGE = Address(Exchange.COMMANDS, "charge.card")
BAD = Address(Exchange.COMMANDS, "nobody.home")
BY_HAND = 1e9
OPTIONS = RelayOptions(lease=15, sweep_every=BY_HAND, backoff_first=0.5, backoff_most=30, share=1)
SWEEPING = RelayOptions(lease=15, sweep_every=1, share=1)
SUPERVISOR_PAUSE = 0.1


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    async with open_store(database_url) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _never_calibrate_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' clock runs far ahead of the database's."""
    monkeypatch.setattr("events.storeclock._CALIBRATE_EVERY", BY_HAND)


@pytest.fixture
def bus() -> FakeBus:
    return FakeBus()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def relay(engine: AsyncEngine, bus: FakeBus, clock: ManualClock) -> AsyncIterator[Relay]:
    made = make_relay(engine, bus, clock, options=OPTIONS)
    await made.start()
    yield made
    await made.stop()


def outbound(id: str, address: Address = CHARGE, *, data: bytes = b"{}", bundle: int = 64) -> Outbound:
    return Outbound(Envelope(id=id, source="/test", type=address.key, version=1, data=data), address, bundle)


async def commit(engine: AsyncEngine, relay: Relay, *messages: Outbound) -> None:
    async with transaction(engine) as connection:
        after_commit = await relay.write(connection, messages)
    after_commit()


async def commit_and_die(engine: AsyncEngine, clock: ManualClock, *messages: Outbound) -> None:
    """Commit rows as a process that dies before it publishes them."""
    dead = make_relay(engine, FakeBus(), clock, options=OPTIONS)
    await dead._store_clock.calibrate()
    async with transaction(engine) as connection:
        await dead.write(connection, messages)


async def rows(engine: AsyncEngine) -> list[Row[Any]]:
    async with transaction(engine) as connection:
        return list((await connection.execute(outbox.select().order_by(outbox.c.id))).all())


async def empty(engine: AsyncEngine) -> None:
    async def nothing_left() -> bool:
        return await count_rows(engine, outbox) == 0

    await until(nothing_left)


def ids(published: list[Outgoing]) -> list[str]:
    return [envelope.id for each in published for envelope in envelopes(each.body)]


# The fast path


async def test_what_is_committed_is_published_and_deleted_once_confirmed(
    engine: AsyncEngine, bus: FakeBus, relay: Relay
) -> None:
    await commit(engine, relay, outbound("1"), outbound("2"))
    await bus.seen(1)
    assert ids(bus.published) == ["1", "2"]
    assert bus.published[0].address == CHARGE
    await empty(engine)
    assert len(bus.attempts) == 1


async def test_what_is_rolled_back_is_never_published(engine: AsyncEngine, bus: FakeBus, relay: Relay) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with transaction(engine) as connection:
            await relay.write(connection, [outbound("1")])
            raise ZeroDivisionError
    assert await count_rows(engine, outbox) == 0
    await commit(engine, relay, outbound("2"))
    await bus.seen(1)
    assert ids(bus.attempts) == ["2"]


async def test_nothing_to_write_needs_no_database(engine: AsyncEngine, relay: Relay) -> None:
    async with transaction(engine) as connection:
        (await relay.write(connection, []))()


async def test_what_no_receiver_would_take_is_refused_before_it_is_written(engine: AsyncEngine, relay: Relay) -> None:
    async with transaction(engine) as connection:
        with pytest.raises(TooLargeError, match="send a reference"):
            await relay.write(connection, [outbound("1", data=b'"' + b"x" * Limits().body + b'"')])
        with pytest.raises(InvalidMessageError, match="NUL"):
            await relay.write(connection, [outbound("2", data=b'{"name":"\\u0000"}')])
    assert await count_rows(engine, outbox) == 0


async def test_too_large_is_too_large_however_often_it_is_tried() -> None:
    message = outbound("1", data=b'"' + b"x" * Limits().body + b'"')
    for _ in range(2):
        with pytest.raises(TooLargeError):
            message.encode(Limits())


async def test_the_largest_message_fits_to_the_byte(engine: AsyncEngine, bus: FakeBus, relay: Relay) -> None:
    overhead = len(outbound("1", data=b'""').envelope.encode()) + 2
    largest = outbound("1", data=b'"' + b"x" * (Limits().body - overhead) + b'"')
    await commit(engine, relay, largest)
    await bus.seen(1)
    assert len(bus.published[0].body) == Limits().body
    with pytest.raises(TooLargeError):
        outbound("1", data=b'"' + b"x" * (Limits().body - overhead + 1) + b'"').encode(Limits())


async def test_each_row_has_an_id_of_its_own_and_the_event_keeps_its_own(
    engine: AsyncEngine, clock: ManualClock
) -> None:
    await commit_and_die(engine, clock, outbound("same"), outbound("same"))
    first, second = await rows(engine)
    assert first.id != second.id
    assert {first.id.version, second.id.version} == {7}
    assert first.body == second.body


# Not confirmed


async def test_what_is_not_confirmed_stays_and_is_published_again_later_and_later(
    engine: AsyncEngine, bus: FakeBus, relay: Relay, clock: ManualClock
) -> None:
    bus.answer = lambda _: PublishError("a queue is full")
    await commit(engine, relay, outbound("1"))
    await bus.seen(1, attempts=True)
    for attempts, wait in enumerate([1, 2, 4, 8, 16, 30, 30], 1):
        await _recorded(engine, attempts)
        [row] = await rows(engine)
        assert row.error == "publish: a queue is full"
        clock.advance(wait - 0.5)
        assert await relay.sweep() == 0, "not due yet"
        clock.advance(0.5)
        assert await relay.sweep() == 1
    bus.answer = lambda _: None
    await _recorded(engine, 8)
    clock.advance(30)
    assert await relay.sweep() == 1
    await empty(engine)
    assert ids(bus.attempts) == ["1"] * 9
    assert len({each.body for each in bus.attempts}) == 1


async def _recorded(engine: AsyncEngine, attempts: int) -> None:
    async def reached() -> bool:
        return [row.attempts for row in await rows(engine)] == [attempts]

    await until(reached)


async def test_a_row_that_is_never_confirmed_does_not_hold_others_back(
    engine: AsyncEngine, bus: FakeBus, relay: Relay, clock: ManualClock
) -> None:
    bus.answer = lambda message: UnroutableError() if message.address == BAD else None
    await commit(engine, relay, outbound("bad", BAD), outbound("good"), outbound("better"))
    await bus.seen(1)
    await _recorded(engine, 1)
    await commit(engine, relay, outbound("later"))
    await bus.seen(2)
    assert ids(bus.published) == ["good", "better", "later"]
    await _recorded(engine, 1)
    [row] = await rows(engine)
    assert (row.routing_key, row.error.partition(":")[0]) == ("nobody.home", "unroutable")
    clock.advance(100)
    await commit_and_die(engine, clock, outbound("swept"))
    clock.advance(100)
    await relay.sweep()
    assert "swept" in ids(bus.published)


async def test_a_table_full_of_bad_rows_does_not_hold_back_a_good_one(
    engine: AsyncEngine, bus: FakeBus, clock: ManualClock
) -> None:
    relay = make_relay(engine, bus, clock, options=RelayOptions(sweep_limit=2, share=1))
    await commit_and_die(engine, clock, *(outbound(f"bad {n}", BAD) for n in range(6)), outbound("good"))
    bus.answer = lambda message: UnroutableError() if message.address == BAD else None
    await relay._store_clock.calibrate()
    clock.advance(60)
    for _ in range(4):  # each goes on where the last one gave up, since bad rows wait longer
        await relay.sweep()
    assert ids(bus.published) == ["good"]


# Left behind


async def test_rows_of_a_dead_process_are_published_once_its_lease_is_over(
    engine: AsyncEngine, bus: FakeBus, relay: Relay, clock: ManualClock
) -> None:
    await commit_and_die(engine, clock, outbound("1"), outbound("2"))
    clock.advance(14)
    assert await relay.sweep() == 0
    assert await count_rows(engine, outbox) == 2
    clock.advance(60)
    assert await relay.sweep() == 2
    assert sorted(ids(bus.published)) == ["1", "2"]
    await empty(engine)


async def test_rows_left_behind_are_looked_for_now_and_then(
    engine: AsyncEngine, bus: FakeBus, clock: ManualClock
) -> None:
    await commit_and_die(engine, clock, outbound("1"))
    relay = make_relay(engine, bus, clock, options=SWEEPING)
    await relay.start()
    await clock.asleep(1)
    clock.advance(60)
    await bus.seen(1)
    await empty(engine)
    await commit_and_die(engine, clock, outbound("2"))
    await clock.asleep(1)
    clock.advance(60)
    await bus.seen(2)
    await empty(engine)
    await relay.stop()


async def test_a_sweep_takes_all_rows_a_few_at_a_time(engine: AsyncEngine, bus: FakeBus, clock: ManualClock) -> None:
    relay = make_relay(engine, bus, clock, options=RelayOptions(sweep_limit=3, share=1))
    await commit_and_die(engine, clock, *(outbound(str(n)) for n in range(8)))
    await relay._store_clock.calibrate()
    clock.advance(60)
    assert await relay.sweep() == 8
    assert sorted(ids(bus.published)) == [str(n) for n in range(8)]
    assert [len(envelopes(each.body)) for each in bus.published] == [3, 3, 2]


async def test_a_sweep_ends_when_the_bus_confirms_nothing(
    engine: AsyncEngine, bus: FakeBus, clock: ManualClock
) -> None:
    relay = make_relay(engine, bus, clock, options=RelayOptions(sweep_limit=2, share=1))
    await commit_and_die(engine, clock, *(outbound(str(n)) for n in range(6)))
    await relay._store_clock.calibrate()
    bus.answer = lambda _: PublishError("the bus is away")
    clock.advance(60)
    assert await relay.sweep() == 2
    assert len(bus.attempts) == 1


async def test_a_claimed_row_is_left_alone_by_the_next_sweep(
    engine: AsyncEngine, bus: FakeBus, relay: Relay, clock: ManualClock
) -> None:
    await commit_and_die(engine, clock, outbound("1"))
    other = make_relay(engine, bus, clock, options=OPTIONS)
    await other._store_clock.calibrate()
    clock.advance(60)
    assert [entry.address for entry in await other._claim()] == [CHARGE]
    assert await relay.sweep() == 0
    clock.advance(60)
    assert await relay.sweep() == 1, "the other one died with its claim"


@pytest.mark.postgres
async def test_two_sweepers_never_take_the_same_row_and_never_wait_for_each_other(pg_url: str) -> None:
    async with open_store(pg_url) as engine:
        clock, bus = ManualClock(), FakeBus()
        relays = [make_relay(engine, bus, clock, options=RelayOptions(sweep_limit=3)) for _ in range(4)]
        await commit_and_die(engine, clock, *(outbound(str(n)) for n in range(12)))
        for relay in relays:
            await relay._store_clock.calibrate()
        clock.advance(60)
        async with transaction(engine) as connection:  # a claim that is not committed yet
            held = (await connection.execute(outbox.select().order_by(outbox.c.id).limit(3).with_for_update())).all()
            async with asyncio.timeout(PATIENCE):
                claims = await asyncio.gather(*(relay._claim() for relay in relays))
        taken = [entry.id for claim in claims for entry in claim]
        assert len(taken) == len(set(taken)) == 9
        assert not {row.id for row in held} & set(taken)


@pytest.mark.postgres
async def test_many_sweepers_publish_each_row_once(pg_url: str) -> None:
    async with open_store(pg_url) as engine:
        clock, bus = ManualClock(), FakeBus()
        relays = [make_relay(engine, bus, clock, options=RelayOptions(sweep_limit=5)) for _ in range(3)]
        await commit_and_die(engine, clock, *(outbound(str(n)) for n in range(100)))
        for relay in relays:
            await relay._store_clock.calibrate()
        clock.advance(60)
        await asyncio.gather(*(relay.sweep() for relay in relays))
        assert sorted(ids(bus.published), key=int) == [str(n) for n in range(100)]


# A bus that takes nothing


async def test_while_the_bus_takes_nothing_no_row_is_claimed(
    engine: AsyncEngine, bus: FakeBus, relay: Relay, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def note() -> None:
        asked.set()
        await bus.writable.wait()

    monkeypatch.setattr(bus, "until_writable", note)
    await commit_and_die(engine, clock, outbound("1"))
    [before] = await rows(engine)
    clock.advance(60)
    bus.writable.clear()
    sweeping = asyncio.create_task(relay.sweep())
    async with asyncio.timeout(PATIENCE):
        await asked.wait()
    assert await rows(engine) == [before]
    assert not bus.attempts
    bus.writable.set()
    assert await sweeping == 1
    assert ids(bus.published) == ["1"]


async def test_what_is_committed_while_the_bus_takes_nothing_is_published_once_it_does(
    engine: AsyncEngine, bus: FakeBus, relay: Relay
) -> None:
    bus.writable.clear()
    for number in range(3):
        await commit(engine, relay, outbound(str(number)))
    assert not bus.attempts
    bus.writable.set()
    await bus.seen(1)
    assert ids(bus.attempts) == ["0", "1", "2"]
    await empty(engine)


async def test_what_has_waited_for_longer_than_its_lease_is_left_to_the_sweep(
    engine: AsyncEngine, bus: FakeBus, relay: Relay, clock: ManualClock
) -> None:
    """Another process may have published it by now; and memory must not fill while a broker is away for an hour."""
    bus.writable.clear()
    await commit(engine, relay, outbound("old"))
    clock.advance(16)
    await commit(engine, relay, outbound("new"))
    assert [entry.body for _, batch in relay._waiting for entry in batch] == [outbound("new").encode(Limits())]
    bus.writable.set()
    await bus.seen(2)
    assert sorted(ids(bus.attempts)) == ["new", "old"]
    await empty(engine)


# Faults


@pytest.mark.parametrize("place", ["relay.before_publish", "relay.after_confirm"])
async def test_what_a_crash_leaves_unconfirmed_is_published_under_the_same_event_id(
    engine: AsyncEngine, bus: FakeBus, relay: Relay, clock: ManualClock, place: str
) -> None:
    async def crash() -> None:
        crashed.set()
        raise asyncio.CancelledError  # as a library does whose connection is lost

    crashed = asyncio.Event()
    with armed(place, crash):
        await commit(engine, relay, outbound("1"))
        async with asyncio.timeout(PATIENCE):
            await crashed.wait()
    assert len(await rows(engine)) == 1
    await clock.pass_sleep(SUPERVISOR_PAUSE)
    clock.advance(60)
    await relay.sweep()
    await empty(engine)
    assert ids(bus.attempts) == ["1"] * (2 if place == "relay.after_confirm" else 1)
    await commit(engine, relay, outbound("2"))
    await bus.seen(len(bus.attempts) + 1)


async def test_confirmed_rows_are_deleted_together(
    engine: AsyncEngine, bus: FakeBus, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted: list[int] = []

    async def note(connection: AsyncConnection, table: Table, rows: Sequence[Any]) -> None:
        deleted.append(len(rows))
        await delete_by_id(connection, table, rows)

    monkeypatch.setattr(relay_module, "delete_by_id", note)
    relay = make_relay(engine, bus, clock, options=OPTIONS, delete_every=5)
    await relay.start()
    for number in range(3):
        await commit(engine, relay, outbound(str(number)))
        await bus.seen(number + 1)
    assert await count_rows(engine, outbox) == 3
    await clock.pass_sleep(5)
    await empty(engine)
    assert deleted == [3]
    await relay.stop()


async def test_a_relay_that_stops_leaves_no_confirmed_row_behind(
    engine: AsyncEngine, bus: FakeBus, clock: ManualClock
) -> None:
    """I20: the next process would find it, and publish it once more."""
    relay = make_relay(engine, bus, clock, options=OPTIONS, delete_every=5)
    await relay.start()
    await commit(engine, relay, outbound("1"))
    await bus.seen(1)
    await clock.asleep(5)
    await relay.stop()
    assert await count_rows(engine, outbox) == 0


async def test_rows_that_could_not_be_deleted_are_deleted_when_the_database_is_back(
    engine: AsyncEngine, bus: FakeBus, relay: Relay, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once they waited for the next message to be confirmed, and were published again when their lease was over."""
    broken = ["once"]

    async def refuse_once(*about: Any) -> None:
        if broken:
            broken.pop()
            raise ConnectionResetError("the database is away")
        await delete_by_id(*about)

    monkeypatch.setattr(relay_module, "delete_by_id", refuse_once)
    await commit(engine, relay, outbound("1"))
    await clock.pass_sleep(SUPERVISOR_PAUSE)
    await empty(engine)
    assert not broken
    assert ids(bus.attempts) == ["1"]


async def test_a_sweep_that_finds_the_database_away_is_tried_again(
    engine: AsyncEngine, bus: FakeBus, relay: Relay, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A refused connection comes from the socket, not from SQLAlchemy."""
    broken = ["once"]

    def refuse(
        _connection: Connection, _cursor: object, statement: str, _parameters: object, _context: object, _many: bool
    ) -> None:
        if "UPDATE outbox SET due_at" in statement and broken:
            broken.pop()
            raise ConnectionRefusedError("the database is away")

    event.listen(engine.sync_engine, "before_cursor_execute", refuse)
    await commit_and_die(engine, clock, outbound("1"))
    clock.advance(60)
    assert await relay.sweep() == 0
    assert not broken
    assert await relay.sweep() == 1
    assert ids(bus.published) == ["1"]
    assert "relay.database_away" in {getattr(record, "action", "") for record in caplog.records}


async def test_stopping_leaves_what_is_not_published_to_others_and_can_be_done_twice(
    engine: AsyncEngine, bus: FakeBus, clock: ManualClock
) -> None:
    relay = make_relay(engine, bus, clock, options=OPTIONS)
    await relay.stop()
    await relay.start()
    await relay.stop()
    await relay.stop()
    await commit(engine, relay, outbound("1"))
    assert len(await rows(engine)) == 1
    other = make_relay(engine, bus, clock, options=OPTIONS)
    await other.start()
    clock.advance(60)
    assert await other.sweep() == 1
    await empty(engine)
    await other.stop()


# RabbitMQ


async def test_over_rabbitmq_what_is_committed_arrives_and_what_no_queue_takes_is_kept(
    amqp_url: str, engine: AsyncEngine
) -> None:
    clock = ManualClock()
    rabbitmq = RabbitMQBus(amqp_url, application="tests", clock=SystemClock(), ids=TimeOrderedIds())
    await rabbitmq.open()
    relay = make_relay(engine, rabbitmq, clock, options=OPTIONS)
    try:
        await rabbitmq.declare([Queue("payments", (CHARGE,))])
        mailbox = Mailbox()
        await rabbitmq.consume("payments", mailbox, prefetch=10)
        await relay.start()
        await commit(engine, relay, *(outbound(str(n)) for n in range(10)), outbound("lost", BAD))
        assert [(await mailbox.next()).id for _ in range(10)] == [str(n) for n in range(10)]
        await _recorded(engine, 1)
        [row] = await rows(engine)
        assert row.error.startswith("unroutable: ")

        await rabbitmq.declare([Queue("late", (BAD,))])
        late = Mailbox()
        await rabbitmq.consume("late", late, prefetch=10)
        clock.advance(60)
        assert await relay.sweep() == 1
        assert (await late.next()).id == "lost"
        await empty(engine)
    finally:
        await relay.stop()
        await rabbitmq.close()
