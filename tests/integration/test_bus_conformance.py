"""What every bus promises, tried on each of them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from events.bus import Address, Bus, Delivery, Exchange, Outgoing, Queue
from events.clock import SystemClock
from events.database import open_database
from events.embedded import EmbeddedBus
from events.errors import BusClosedError, ConfigurationError, UnroutableError
from events.ids import TimeOrderedIds
from events.rabbitmq import RabbitMQBus

CHARGE = Address(Exchange.COMMANDS, "charge.card")
PLACED = Address(Exchange.EVENTS, "order.placed")
NOBODY = Address(Exchange.COMMANDS, "nobody.home")
PAYMENTS = Queue("payments", (CHARGE,))
MAIL = Queue("mail", (PLACED,))
STATISTICS = Queue("statistics", (PLACED,))


class Received:
    """A consumer's callback that keeps what it gets, in order."""

    def __init__(self) -> None:
        self._deliveries: asyncio.Queue[Delivery] = asyncio.Queue()

    def __call__(self, delivery: Delivery) -> None:
        self._deliveries.put_nowait(delivery)

    def __len__(self) -> int:
        return self._deliveries.qsize()

    async def next(self) -> Delivery:
        async with asyncio.timeout(20):
            return await self._deliveries.get()

    async def many(self, count: int) -> list[Delivery]:
        return [await self.next() for _ in range(count)]


def message(address: Address, text: str = "hello") -> Outgoing:
    return Outgoing(address, f'["{text}"]'.encode())


def text(delivery: Delivery) -> str:
    return delivery.body.decode().strip('[]"')


async def publish(bus: Bus, *messages: Outgoing) -> None:
    assert not any(await bus.publish(messages))


@pytest.fixture(params=["embedded", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[Bus]:
    clock = SystemClock()
    if request.param == "rabbitmq":
        rabbitmq = RabbitMQBus(
            request.getfixturevalue("amqp_url"), application="tests", clock=clock, ids=TimeOrderedIds()
        )
        await rabbitmq.open()
        yield rabbitmq
        await rabbitmq.close()
    else:
        engine = open_database(request.getfixturevalue("sqlite_url"))
        embedded = EmbeddedBus(engine, clock=clock)
        await embedded.open()
        yield embedded
        await embedded.close()
        await engine.dispose()


async def test_a_command_reaches_its_queue_and_is_gone_once_acknowledged(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    await publish(bus, message(CHARGE, "first"))
    received = Received()
    consumer = await bus.consume("payments", received, prefetch=1)

    delivery = await received.next()
    assert text(delivery) == "first"
    assert delivery.content_type == "application/cloudevents-batch+json"
    assert not delivery.redelivered
    await delivery.ack()

    await publish(bus, message(CHARGE, "second"))
    await (await received.next()).ack()
    await consumer.cancel()
    await bus.close()
    await bus.open()
    await bus.declare([PAYMENTS])
    await bus.consume("payments", received, prefetch=1)
    await publish(bus, message(CHARGE, "third"))
    assert text(await received.next()) == "third"


async def test_each_bound_queue_gets_its_own_copy_of_an_event(bus: Bus) -> None:
    await bus.declare([MAIL, STATISTICS, PAYMENTS])
    await publish(bus, message(PLACED))
    for queue in (MAIL, STATISTICS):
        received = Received()
        await bus.consume(queue.name, received, prefetch=1)
        await (await received.next()).ack()


async def test_events_are_matched_by_topic_patterns(bus: Bus) -> None:
    await bus.declare(
        [
            Queue("all", (Address(Exchange.EVENTS, "#"),)),
            Queue("orders", (Address(Exchange.EVENTS, "order.#"),)),
            Queue("placed", (Address(Exchange.EVENTS, "*.placed"),)),
        ]
    )
    keys = ("order", "order.placed", "order.item.placed", "bet.placed")
    await publish(bus, *(message(Address(Exchange.EVENTS, key), key) for key in keys))
    expected = {"all": set(keys), "orders": set(keys[:3]), "placed": {"order.placed", "bet.placed"}}
    for queue, texts in expected.items():
        received = Received()
        await bus.consume(queue, received, prefetch=10)
        assert {text(delivery) for delivery in await received.many(len(texts))} == texts


async def test_a_queue_gets_an_event_once_however_many_bindings_match(bus: Bus) -> None:
    await bus.declare([Queue("mail", (PLACED, Address(Exchange.EVENTS, "order.*"), Address(Exchange.EVENTS, "#")))])
    await publish(bus, message(PLACED, "one"), message(PLACED, "two"))
    received = Received()
    await bus.consume("mail", received, prefetch=10)
    assert sorted(text(delivery) for delivery in await received.many(2)) == ["one", "two"]


@pytest.mark.parametrize("exchange", [Exchange.COMMANDS, Exchange.REPLIES])
async def test_a_command_or_reply_that_no_queue_takes_is_unroutable(bus: Bus, exchange: Exchange) -> None:
    [error] = await bus.publish([message(Address(exchange, "nobody.home"))])
    assert isinstance(error, UnroutableError)
    assert "nobody.home" in str(error)


async def test_an_event_needs_no_receiver(bus: Bus) -> None:
    await publish(bus, message(PLACED))


async def test_publishing_nothing_is_fine(bus: Bus) -> None:
    assert list(await bus.publish([])) == []


async def test_of_many_messages_exactly_the_unroutable_ones_are_reported(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    mixed = [message(NOBODY if number % 2 else CHARGE, str(number)) for number in range(200)]
    results = await bus.publish(mixed)
    assert [isinstance(result, UnroutableError) for result in results] == [bool(number % 2) for number in range(200)]
    assert [result for result in results if result is not None and not isinstance(result, UnroutableError)] == []

    received = Received()
    await bus.consume("payments", received, prefetch=200)
    assert sorted(int(text(delivery)) for delivery in await received.many(100)) == list(range(0, 200, 2))


async def test_consumers_of_one_queue_share_its_messages(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    one, other = Received(), Received()
    await bus.consume("payments", one, prefetch=1)
    await bus.consume("payments", other, prefetch=1)
    await publish(bus, message(CHARGE, "a"), message(CHARGE, "b"))
    assert {text(await one.next()), text(await other.next())} == {"a", "b"}


async def test_prefetch_bounds_what_is_unacknowledged(bus: Bus) -> None:
    await bus.declare([MAIL, STATISTICS])
    narrow, wide = Received(), Received()
    await bus.consume("mail", narrow, prefetch=2)
    await bus.consume("statistics", wide, prefetch=10)
    await publish(bus, *(message(PLACED, str(number)) for number in range(5)))
    await wide.many(5)  # by now the other queue has had its chance to deliver too many
    first, second = await narrow.many(2)
    assert len(narrow) == 0
    await first.ack()
    await second.ack()
    await narrow.many(2)
    assert len(narrow) == 0


async def test_prefetch_is_each_consumers_own(bus: Bus) -> None:
    await bus.declare([PAYMENTS, MAIL])
    payments, mail = Received(), Received()
    await bus.consume("payments", payments, prefetch=1)
    await bus.consume("mail", mail, prefetch=3)
    await publish(bus, *(message(CHARGE) for _ in range(3)), *(message(PLACED) for _ in range(3)))
    await mail.many(3)
    await payments.next()
    assert len(payments) == 0


async def test_what_was_not_acknowledged_comes_back_marked_as_redelivered(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    received = Received()
    await bus.consume("payments", received, prefetch=10)
    await publish(bus, message(CHARGE, "kept"), message(CHARGE, "lost"))
    for delivery in await received.many(2):
        if text(delivery) == "kept":
            await delivery.ack()
    await bus.close()

    await bus.open()
    await bus.declare([PAYMENTS])
    again = Received()
    await bus.consume("payments", again, prefetch=10)
    delivery = await again.next()
    assert text(delivery) == "lost"
    assert delivery.redelivered


async def test_an_acknowledgement_from_before_a_reconnect_does_nothing(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    received = Received()
    await bus.consume("payments", received, prefetch=1)
    await publish(bus, message(CHARGE))
    stale = await received.next()
    await bus.close()
    await stale.requeue()
    await bus.open()
    await bus.declare([PAYMENTS])
    await stale.ack()

    again = Received()
    await bus.consume("payments", again, prefetch=1)
    delivery = await again.next()
    assert delivery.redelivered
    await stale.ack()
    await delivery.ack()


async def test_a_message_given_back_is_delivered_again(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    received = Received()
    await bus.consume("payments", received, prefetch=1)
    await publish(bus, message(CHARGE))
    await (await received.next()).requeue()
    delivery = await received.next()
    assert delivery.redelivered
    assert text(delivery) == "hello"


async def test_settling_a_delivery_twice_is_fine(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    received = Received()
    await bus.consume("payments", received, prefetch=1)
    await publish(bus, message(CHARGE, "first"), message(CHARGE, "second"))
    delivery = await received.next()
    await delivery.ack()
    await delivery.ack()
    await delivery.requeue()
    second = await received.next()
    assert {text(delivery), text(second)} == {"first", "second"}
    assert not second.redelivered


async def test_a_callback_that_raises_gets_the_message_again(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    await bus.declare([PAYMENTS])
    received = Received()
    broken = True

    def deliver(delivery: Delivery) -> None:
        nonlocal broken
        if broken:
            broken = False
            raise RuntimeError("cannot take this")
        received(delivery)

    with caplog.at_level(logging.ERROR, "events"):
        await bus.consume("payments", deliver, prefetch=1)
        await publish(bus, message(CHARGE))
        delivery = await received.next()
    assert delivery.redelivered
    await delivery.ack()
    assert [getattr(record, "action", None) for record in caplog.records] == ["bus.deliver_failed"]

    await publish(bus, message(CHARGE, "next"))
    assert text(await received.next()) == "next"


async def test_a_message_that_can_never_be_taken_ends_as_a_dead_letter(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    received, dead = Received(), Received()

    def deliver(delivery: Delivery) -> None:
        if text(delivery) == "poison":
            raise RuntimeError("cannot take this")
        received(delivery)

    await bus.consume("payments", deliver, prefetch=1)
    await bus.consume("dead-letters", dead, prefetch=1)
    await publish(bus, message(CHARGE, "poison"), message(CHARGE, "fine"))
    assert text(await dead.next()) == "poison"
    assert text(await received.next()) == "fine"


async def test_a_cancelled_consumer_gets_nothing_more_but_may_settle_what_it_has(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    first, second = Received(), Received()
    consumer = await bus.consume("payments", first, prefetch=1)
    await publish(bus, message(CHARGE, "held"), message(CHARGE, "later"))
    held = await first.next()
    await consumer.cancel()
    await consumer.cancel()

    await bus.consume("payments", second, prefetch=10)
    later = await second.next()
    assert len(first) == 0
    await held.ack()
    await later.ack()
    await consumer.cancel()
    await bus.close()

    await bus.open()
    await bus.declare([PAYMENTS])
    await bus.consume("payments", second, prefetch=10)
    await publish(bus, message(CHARGE, "only this"))
    assert text(await second.next()) == "only this"


async def test_a_cancelled_consumer_can_give_back_what_it_holds(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    first, second = Received(), Received()
    consumer = await bus.consume("payments", first, prefetch=1)
    await publish(bus, message(CHARGE))
    held = await first.next()
    await consumer.cancel()
    await bus.consume("payments", second, prefetch=1)
    await held.requeue()
    assert (await second.next()).redelivered


async def test_declaring_again_changes_nothing_and_adds_bindings(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    await publish(bus, message(CHARGE, "old"))
    await bus.declare([PAYMENTS, PAYMENTS])
    await bus.declare([Queue("payments", (PLACED,))])
    await publish(bus, message(CHARGE, "new"), message(PLACED, "event"))
    received = Received()
    await bus.consume("payments", received, prefetch=10)
    assert {text(delivery) for delivery in await received.many(3)} == {"old", "new", "event"}


async def test_a_large_body_arrives_whole(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    body = b"[" + b"1" * 1_000_000 + b"]"
    await publish(bus, Outgoing(CHARGE, body), Outgoing(CHARGE, b""))
    received = Received()
    await bus.consume("payments", received, prefetch=2)
    assert {delivery.body for delivery in await received.many(2)} == {body, b""}


async def test_consuming_a_queue_that_was_not_declared_is_a_configuration_error(bus: Bus) -> None:
    with pytest.raises(ConfigurationError, match="unheard-of"):
        await bus.consume("unheard-of", Received(), prefetch=1)


async def test_opening_and_closing_twice_is_fine(bus: Bus) -> None:
    await bus.open()
    await bus.close()
    await bus.close()
    await bus.open()
    await bus.declare([PAYMENTS])
    await publish(bus, message(CHARGE))


async def test_a_closed_bus_says_so(bus: Bus) -> None:
    await bus.close()
    attempts: list[Callable[[], Awaitable[object]]] = [
        lambda: bus.publish([message(CHARGE)]),
        lambda: bus.declare([PAYMENTS]),
        lambda: bus.consume("payments", Received(), prefetch=1),
    ]
    for attempt in attempts:
        with pytest.raises(BusClosedError):
            await attempt()


async def test_nothing_is_delivered_twice_or_lost_when_many_are_published_and_settled_at_once(bus: Bus) -> None:
    await bus.declare([PAYMENTS])
    received = Received()
    await bus.consume("payments", received, prefetch=20)
    batches = [[message(CHARGE, f"{batch}-{number}") for number in range(50)] for batch in range(10)]
    publishing = [asyncio.create_task(bus.publish(batch)) for batch in batches]
    seen: list[str] = []
    while len(seen) < 500:
        delivery = await received.next()
        seen.append(text(delivery))
        await delivery.ack()
    for task in publishing:
        assert not any(await task)
    assert sorted(seen) == sorted(f"{batch}-{number}" for batch in range(10) for number in range(50))
