"""The outbox of a service: its messages follow its own transaction, on both databases, in sync and async sessions."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy import Engine, create_engine, make_url, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from events.codec import Limits
from events.database import transaction
from events.envelope import Envelope
from events.errors import InvalidMessageError, TooLargeError
from events.outbox import ServiceOutbox
from events.relay import Relay, RelayOptions
from events.tables import outbox
from tests.support.flows import (
    PATIENCE,
    ChargeCard,
    FakeBus,
    ManualClock,
    OrderPlaced,
    count_rows,
    effects,
    envelopes,
    make_relay,
    open_store,
    until,
)

SOURCE = "/shop"
BY_HAND = 1e9  # seconds between sweeps: nothing but a commit wakes the relay


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    async with open_store(database_url) as opened:
        yield opened


@pytest.fixture
def sync_engine(engine: AsyncEngine, database_url: str) -> Iterator[Engine]:  # noqa: ARG001  # it makes the tables
    """What a service that is not asynchronous uses."""
    url = make_url(database_url)
    name = "postgresql+psycopg" if url.get_backend_name() == "postgresql" else "sqlite"
    made = create_engine(url.set(drivername=name))
    yield made
    made.dispose()


@pytest.fixture
def bus() -> FakeBus:
    return FakeBus()


@pytest.fixture
async def relay(engine: AsyncEngine, bus: FakeBus) -> AsyncIterator[Relay]:
    made = make_relay(engine, bus, ManualClock(), options=RelayOptions(sweep_every=BY_HAND))
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def shop() -> ServiceOutbox:
    return ServiceOutbox(SOURCE)


async def waiting(engine: AsyncEngine) -> list[Envelope]:
    async with transaction(engine) as connection:
        bodies = (await connection.execute(select(outbox.c.body).order_by(outbox.c.id))).scalars()
        return [envelope for body in bodies for envelope in envelopes(b"[%b]" % body)]


def orders(found: list[Envelope]) -> list[bytes]:
    return sorted(envelope.data for envelope in found)


async def test_a_message_is_stored_with_the_work_of_its_session(engine: AsyncEngine, shop: ServiceOutbox) -> None:
    async with AsyncSession(engine) as session, session.begin():
        await session.execute(effects.insert().values(what="order 1"))
        event_id = shop.add(session, OrderPlaced(order="1"), correlation_id="basket 7", causation_id="click 9")
    [envelope] = await waiting(engine)
    assert (envelope.id, envelope.source, envelope.type) == (event_id, SOURCE, "order.placed")
    assert (envelope.correlation_id, envelope.causation_id) == ("basket 7", "click 9")
    assert envelope.data == b'{"order":"1"}'
    assert await count_rows(engine, effects) == 1


async def test_events_and_commands_go_where_they_belong(engine: AsyncEngine, shop: ServiceOutbox) -> None:
    async with AsyncSession(engine) as session, session.begin():
        shop.add(session, OrderPlaced(order="1"))
        shop.add(session, ChargeCard(order="1"))
    async with transaction(engine) as connection:
        rows = (await connection.execute(outbox.select())).all()
    assert {(row.exchange, row.routing_key) for row in rows} == {
        ("events", "order.placed"),
        ("commands", "charge.card"),
    }
    assert len({row.id for row in rows}) == 2


async def test_a_given_event_id_is_kept(engine: AsyncEngine, shop: ServiceOutbox) -> None:
    async with AsyncSession(engine) as session, session.begin():
        assert shop.add(session, OrderPlaced(order="1"), id="order-1") == "order-1"
        assert shop.add(session, OrderPlaced(order="1"), id="order-1") == "order-1"
    assert [envelope.id for envelope in await waiting(engine)] == ["order-1", "order-1"]


async def test_a_rollback_sends_nothing(engine: AsyncEngine, bus: FakeBus, relay: Relay, shop: ServiceOutbox) -> None:
    async with AsyncSession(engine) as session:
        shop.add(session, OrderPlaced(order="1"))
        await session.flush()
        await session.rollback()
        shop.add(session, OrderPlaced(order="2"))
        await session.rollback()
    assert await count_rows(engine, outbox) == 0
    assert await relay.sweep() == 0
    assert bus.attempts == []


async def test_a_savepoint_that_is_rolled_back_drops_its_own_messages_only(
    engine: AsyncEngine, shop: ServiceOutbox
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        shop.add(session, OrderPlaced(order="before"))
        savepoint = await session.begin_nested()
        shop.add(session, OrderPlaced(order="dropped"))
        await session.flush()
        await savepoint.rollback()
        async with session.begin_nested():
            shop.add(session, OrderPlaced(order="kept"))
        shop.add(session, OrderPlaced(order="after"))
    assert orders(await waiting(engine)) == [b'{"order":"after"}', b'{"order":"before"}', b'{"order":"kept"}']


@pytest.mark.usefixtures("relay")
async def test_the_relay_wakes_after_the_commit(engine: AsyncEngine, bus: FakeBus, shop: ServiceOutbox) -> None:
    async with AsyncSession(engine) as session:
        for number in range(3):
            shop.add(session, OrderPlaced(order=str(number)))
            await session.commit()
            await bus.seen(number + 1)
    assert [envelopes(each.body)[0].data for each in bus.published] == [b'{"order":"%d"}' % n for n in range(3)]

    async def nothing_left() -> bool:
        return await count_rows(engine, outbox) == 0

    await until(nothing_left)


async def test_a_savepoint_does_not_wake_the_relay_but_the_commit_after_it(
    engine: AsyncEngine, relay: Relay, shop: ServiceOutbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLAlchemy reports the release of a savepoint as a commit, too; the relay once took it for the real one."""
    woken = asyncio.Event()

    async def sweep() -> int:
        woken.set()
        return 0

    monkeypatch.setattr(relay, "sweep", sweep)
    async with AsyncSession(engine) as session, session.begin():
        async with session.begin_nested():
            shop.add(session, OrderPlaced(order="1"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not woken.is_set()
    async with asyncio.timeout(PATIENCE):
        await woken.wait()


@pytest.mark.parametrize(("order", "error"), [("x" * 300_000, TooLargeError), ("NUL \0", InvalidMessageError)])
async def test_a_message_that_no_receiver_would_take_is_refused_and_the_transaction_is_still_usable(
    engine: AsyncEngine, shop: ServiceOutbox, order: str, error: type[Exception]
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        await session.execute(effects.insert().values(what="order 1"))
        with pytest.raises(error):
            shop.add(session, OrderPlaced(order=order))
        shop.add(session, OrderPlaced(order="a reference"))
    assert orders(await waiting(engine)) == [b'{"order":"a reference"}']
    assert await count_rows(engine, effects) == 1


async def test_the_limit_is_what_receivers_take_to_the_byte(engine: AsyncEngine) -> None:
    limit = 2000
    shop = ServiceOutbox(SOURCE, clock=ManualClock(), limits=Limits(body=limit))
    async with AsyncSession(engine) as session:
        shop.add(session, OrderPlaced(order=""), id="1")
        await session.flush()
        body = (await session.execute(select(outbox.c.body))).scalar_one()
        room = limit - len(body) - 2
        shop.add(session, OrderPlaced(order="x" * room), id="1")
        with pytest.raises(TooLargeError):
            shop.add(session, OrderPlaced(order="x" * (room + 1)), id="1")


async def test_a_sync_session_works_alike(sync_engine: Engine, engine: AsyncEngine, shop: ServiceOutbox) -> None:
    with Session(sync_engine) as session, session.begin():
        shop.add(session, OrderPlaced(order="kept"))
        with session.begin_nested() as savepoint:
            shop.add(session, OrderPlaced(order="dropped"))
            session.flush()
            savepoint.rollback()
        with pytest.raises(TooLargeError):
            shop.add(session, OrderPlaced(order="x" * 300_000))
    with Session(sync_engine) as session:
        shop.add(session, OrderPlaced(order="rolled back"))
        session.flush()
        session.rollback()
    sync_engine.dispose()
    assert orders(await waiting(engine)) == [b'{"order":"kept"}']


@pytest.mark.usefixtures("relay")
async def test_the_commit_of_a_sync_session_in_another_thread_wakes_the_relay(
    sync_engine: Engine, bus: FakeBus, shop: ServiceOutbox
) -> None:

    def serve() -> None:
        with Session(sync_engine) as session, session.begin():
            shop.add(session, OrderPlaced(order="1"))
        sync_engine.dispose()

    await asyncio.to_thread(serve)
    await bus.seen(1)
    assert envelopes(bus.published[0].body)[0].data == b'{"order":"1"}'


async def test_a_session_without_messages_does_not_wake_the_relay(engine: AsyncEngine, relay: Relay) -> None:
    async with AsyncSession(engine) as session, session.begin():
        await session.execute(effects.insert().values(what="nothing to send"))
    assert not relay._to_sweep.is_set()


async def test_a_relay_that_was_stopped_does_not_listen_any_more(engine: AsyncEngine, shop: ServiceOutbox) -> None:
    bus = FakeBus()
    relay = make_relay(engine, bus, ManualClock(), options=RelayOptions(sweep_every=BY_HAND))
    await relay.start()
    await relay.stop()
    async with AsyncSession(engine) as session, session.begin():
        shop.add(session, OrderPlaced(order="1"))
    assert not relay._to_sweep.is_set()
    assert len(await waiting(engine)) == 1
    assert bus.attempts == []
