"""Faults of the broker, put in for real: whatever it does, what it has confirmed arrives, and we go on by ourselves.

Nothing here sends a command again because its step is late. Where the watchdog is not what a test is about it looks
NEVER, so that it mends nothing that others should. test_defences.py takes them away in turn.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiormq.exceptions import ChannelAccessRefused
from pamqp.commands import Basic
from sqlalchemy.ext.asyncio import AsyncEngine
from yarl import URL

from coordinator.settings import load_settings
from events.bus import Address, Exchange, Outgoing, Queue
from events.clock import SystemClock
from events.database import transaction
from events.errors import PublishError, UnroutableError
from events.ids import TimeOrderedIds
from events.rabbitmq import RabbitMQBus, RabbitMQOptions
from events.tables import outbox
from tests.support.flows import Mailbox, envelopes, open_store
from tests.support.proxy import Proxy, Way
from tests.support.rabbitmq import (
    CHARGE,
    NEVER,
    PAYMENTS,
    Received,
    opened,
    publish_until_confirmed,
    under_load,
    until,
    wire,
)
from tests.support.relays import Load, leave_behind, relaying
from tests.support.servers import RabbitMQ

pytestmark = pytest.mark.rabbitmq

KILLS = int(os.environ.get("BROKER_KILLS", "3"))  # every second one is a clean restart
SHORT_HEARTBEAT = "?heartbeat=1"
MAIL = Address(Exchange.COMMANDS, "send.mail")


@pytest.fixture
async def engine(sqlite_url: str) -> AsyncIterator[AsyncEngine]:
    async with open_store(sqlite_url) as made:
        yield made


def actions(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [getattr(record, "action", "") for record in caplog.records]


async def control(broker: RabbitMQ, *arguments: str) -> None:
    await asyncio.to_thread(broker.control, *arguments)


# The broker goes down and comes back (F16)


async def test_f16_no_confirmed_message_is_lost_however_often_the_broker_is_killed_or_restarted(
    private_rabbitmq: RabbitMQ, private_amqp_url: str
) -> None:
    async with opened(private_amqp_url, watch_every=NEVER) as bus, under_load(bus) as ledger:
        await asyncio.to_thread(private_rabbitmq.flush)
        for number in range(KILLS):
            end = private_rabbitmq.stop if number % 2 else private_rabbitmq.kill9
            await ledger.confirms(200)
            await asyncio.to_thread(end)
            [error] = await bus.publish([Outgoing(CHARGE, b"[-1]")])
            assert isinstance(error, PublishError)
            await until(lambda: "is lost" in (bus.problem or ""))
            await asyncio.to_thread(private_rabbitmq.start)
            await bus.until_writable()
            await ledger.confirms(200)
        await until(lambda: bus.problem is None)
        assert not any(isinstance(error, UnroutableError) for error in ledger.errors)


# A broker that stands still (F17)


async def test_f17_a_broker_that_is_stopped_for_longer_than_the_heartbeat_costs_nothing(
    private_rabbitmq: RabbitMQ, private_amqp_url: str
) -> None:
    async with (
        opened(private_amqp_url + SHORT_HEARTBEAT, publish_timeout=2, watch_every=NEVER) as bus,
        under_load(bus) as ledger,
    ):
        private_rabbitmq.pause()
        try:
            await until(lambda: "does not confirm" in (bus.problem or ""))
            await until(lambda: "is lost" in (bus.problem or ""))
        finally:
            private_rabbitmq.resume()
        await ledger.confirms(200)
        assert bus.problem is None


async def test_f17_a_broker_that_is_stopped_for_less_than_the_heartbeat_costs_nothing(
    private_rabbitmq: RabbitMQ, private_amqp_url: str
) -> None:
    async with opened(private_amqp_url, publish_timeout=0.5, watch_every=NEVER) as bus, under_load(bus) as ledger:
        private_rabbitmq.pause()
        try:
            await until(lambda: "does not confirm" in (bus.problem or ""))
        finally:
            private_rabbitmq.resume()
        await ledger.confirms(200)
        assert bus.problem is None


# Half-open connections (F18)


@pytest.mark.parametrize("way", Way)
async def test_f18_a_connection_that_is_open_in_one_direction_only_is_replaced(amqp_url: str, way: Way) -> None:
    proxy = Proxy(URL(amqp_url))
    async with (
        proxy.running() as url,
        opened(url + SHORT_HEARTBEAT, publish_timeout=1, watch_every=NEVER) as bus,
        under_load(bus) as ledger,
    ):
        proxy.swallow(way)
        await until(lambda: bus.problem is not None)
        await ledger.confirms(200)
        assert bus.problem is None


# An alarm blocks publishing (F20)


@pytest.fixture(params=["memory", "disk"])
def alarm(request: pytest.FixtureRequest) -> tuple[list[str], list[str]]:
    """What raises an alarm, and what ends it."""
    if request.param == "memory":
        return ["set_vm_memory_high_watermark", "0"], ["set_vm_memory_high_watermark", "absolute", "512MB"]
    return ["set_disk_free_limit", "1000000GB"], ["set_disk_free_limit", "50MB"]


async def test_f20_while_an_alarm_blocks_publishing_the_relay_claims_nothing_and_then_goes_on(
    private_rabbitmq: RabbitMQ,
    private_amqp_url: str,
    engine: AsyncEngine,
    alarm: tuple[list[str], list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with opened(private_amqp_url, publish_timeout=1, watch_every=NEVER) as bus, relaying(engine, bus) as relay:
        await bus.declare([PAYMENTS])
        mailbox = Mailbox()
        await bus.consume(PAYMENTS.name, mailbox, prefetch=50)
        load = Load(engine, relay)
        await load.commit()
        await load.is_published()
        begin, end = alarm
        await control(private_rabbitmq, *begin)
        try:
            await load.commit(1)  # RabbitMQ tells only those who publish
            await until(lambda: "blocked publishing" in (bus.problem or ""))
            waiting = await load.commit()
            left_behind = await leave_behind(engine)
            load.ids += left_behind
            for _ in range(2):  # the time that this takes is that of many sweeps
                [error] = await bus.publish([Outgoing(CHARGE, b"[]")])
                assert "blocked publishing" in str(error)
            async with transaction(engine) as connection:
                rows = (await connection.execute(outbox.select())).all()
            assert [row.attempts for row in rows if b'"/behind"' in row.body] == [0] * len(left_behind)
            assert {row.due_at < SystemClock().now() for row in rows if b'"/behind"' in row.body} == {True}
        finally:
            await control(private_rabbitmq, *end)
        arrived = await load.everything_arrives(mailbox)
        assert all(arrived.count(each) == 1 for each in waiting + left_behind)
        await load.is_published()
        assert bus.problem is None
        await until(lambda: "bus.unblocked" in actions(caplog))
    assert actions(caplog).count("bus.blocked") == 1
    assert actions(caplog).count("bus.unblocked") == 1


async def test_f20_a_blocked_bus_can_be_closed(private_rabbitmq: RabbitMQ, private_amqp_url: str) -> None:
    async with opened(private_amqp_url, publish_timeout=0.5, connect_timeout=2) as bus:
        await bus.declare([PAYMENTS])
        await control(private_rabbitmq, "set_vm_memory_high_watermark", "0")
        try:
            await bus.publish([Outgoing(CHARGE, b"[1]")])
            await until(lambda: "blocked publishing" in (bus.problem or ""))
            async with asyncio.timeout(10):
                await bus.close()
        finally:
            await control(private_rabbitmq, "set_vm_memory_high_watermark", "absolute", "512MB")


# A binding is missing (F21)


async def test_f21_what_no_queue_takes_waits_until_the_binding_is_back(amqp_url: str, engine: AsyncEngine) -> None:
    async with opened(amqp_url, watch_every=NEVER) as bus, relaying(engine, bus) as relay, wire(amqp_url) as channel:
        await bus.declare([PAYMENTS])
        mailbox = Mailbox()
        await bus.consume(PAYMENTS.name, mailbox, prefetch=50)
        load = Load(engine, relay)
        await load.commit()
        queue = await channel.get_queue("saga.payments")
        await queue.unbind("saga.commands", CHARGE.key)
        missing = await load.commit()

        async with asyncio.timeout(30):
            while await load.refused("unroutable") < len(missing):  # noqa: ASYNC110  # a database tells nobody
                await asyncio.sleep(0.02)
        await load.commit()
        await queue.bind("saga.commands", CHARGE.key)
        await load.everything_arrives(mailbox)
        await load.is_published()


async def test_f21_a_deleted_binding_is_made_again(amqp_url: str) -> None:
    async with (
        opened(amqp_url, watch_every=0.05, reconcile_every=0.05) as bus,
        under_load(bus) as ledger,
        wire(amqp_url) as channel,
    ):
        queue = await channel.get_queue("saga.payments")
        for _ in range(3):
            await queue.unbind("saga.commands", CHARGE.key)
            await ledger.confirms(100)


# Queues deleted or emptied by an operator (F22)


async def test_f22_a_consumer_resumes_when_its_queue_was_deleted(amqp_url: str) -> None:
    async with opened(amqp_url, watch_every=NEVER) as bus:
        await bus.declare([PAYMENTS])
        received = Received()
        await bus.consume("payments", received, prefetch=5)
        async with wire(amqp_url) as channel:
            await channel.queue_delete("saga.payments")
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[1]"))
        await (await received.next()).ack()


async def test_f22_a_deleted_queue_that_nobody_consumes_here_is_made_again(amqp_url: str) -> None:
    async with opened(amqp_url, watch_every=0.05, reconcile_every=0.05) as bus:
        await bus.declare([Queue("mail", (MAIL,))])
        async with wire(amqp_url) as channel:
            await channel.queue_delete("saga.mail")
        await publish_until_confirmed(bus, Outgoing(MAIL, b"[1]"))


async def test_f22_an_emptied_queue_is_consumed_further(amqp_url: str) -> None:
    async with opened(amqp_url, watch_every=NEVER) as bus:
        await bus.declare([PAYMENTS])
        await bus.publish([Outgoing(CHARGE, b"[1]")] * 50)
        received = Received()
        await bus.consume(PAYMENTS.name, received, prefetch=10)
        held = [await received.next() for _ in range(10)]
        async with wire(amqp_url) as channel:
            await (await channel.get_queue("saga.payments")).purge()
        for delivery in held:
            await delivery.ack()
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[2]"))
        while (delivery := await received.next()).body != b"[2]":
            await delivery.ack()


async def test_f22_events_wait_until_the_queues_of_a_vhost_that_was_reset_are_made_again(
    private_rabbitmq: RabbitMQ, private_amqp_url: str, engine: AsyncEngine
) -> None:
    """Once they were published as soon as the exchange was back: RabbitMQ confirmed them, and nobody got them."""
    placed = Address(Exchange.EVENTS, "order.placed")
    async with opened(private_amqp_url, watch_every=NEVER) as bus, relaying(engine, bus) as relay:
        await bus.declare([Queue("orders", (placed,))])
        mailbox = Mailbox()
        await bus.consume("orders", mailbox, prefetch=50)
        load = Load(engine, relay, placed)
        await load.commit()
        await load.everything_arrives(mailbox)
        publishing, consuming = bus._publishing, bus._consuming
        assert publishing is not None
        assert consuming is not None
        right, consuming.url = consuming.url, URL("amqp://127.0.0.1:1/")  # that connection comes back later
        await asyncio.to_thread(private_rabbitmq.reset, private_amqp_url)
        await until(lambda: not consuming.connected.is_set())
        await until(lambda: publishing.connected.is_set() and not (bus._publisher is None or bus._publisher.is_closed))
        missing = set(await load.commit())
        [error] = await bus.publish([Outgoing(placed, b"[]")])
        assert isinstance(error, PublishError)
        consuming.url = right
        while missing:
            missing.discard((await mailbox.next()).id)
        await load.is_published()


# A consumer that RabbitMQ has dropped (F23)


async def test_f23_a_consumer_that_the_broker_cancels_is_back_when_the_queue_is(amqp_url: str) -> None:
    async with opened(amqp_url, watch_every=NEVER) as bus, under_load(bus) as ledger, wire(amqp_url) as channel:
        for _ in range(3):
            await channel.queue_delete("saga.payments")
            ledger.confirmed.clear()  # went with the queue
            await ledger.confirms(100)


async def test_f23_a_consumer_that_the_broker_drops_without_a_word_is_started_again(
    amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(amqp_url, watch_every=0.05, reconcile_every=0.1) as bus:
        await bus.declare([PAYMENTS])
        received = Received()
        consumer: Any = await bus.consume(PAYMENTS.name, received, prefetch=5)
        channel = await consumer._channel.get_underlay_channel()
        await channel.rpc(Basic.Cancel(consumer_tag=consumer._tag, nowait=True))  # RabbitMQ forgets it, we do not
        assert not await consumer.is_deaf()
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[1]"))
        await (await received.next()).ack()
    assert "bus.restarted" in actions(caplog)


async def test_f23_a_consumer_that_the_broker_drops_is_started_again_although_another_one_is_left(
    amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once it stayed deaf for ever: the queue had a consumer, in another process."""
    async with (
        opened(amqp_url) as elsewhere,
        opened(amqp_url, watch_every=0.05, reconcile_every=0.1) as bus,
    ):
        for each in (elsewhere, bus):
            await each.declare([PAYMENTS])
        received = Received()
        consumer: Any = await bus.consume(PAYMENTS.name, received, prefetch=5)
        other = Received()
        await elsewhere.consume(PAYMENTS.name, other, prefetch=1)  # it is busy with its first one
        channel = await consumer._channel.get_underlay_channel()
        await channel.rpc(Basic.Cancel(consumer_tag=consumer._tag, nowait=True))
        for body in (b"[1]", b"[2]"):
            await publish_until_confirmed(elsewhere, Outgoing(CHARGE, body))
        assert (await other.next()).body == b"[1]"
        delivery = await received.next()
        assert delivery.body == b"[2]"
        await delivery.ack()
    assert "bus.restarted" in actions(caplog)


async def test_f23_a_consumer_with_no_room_or_nothing_to_take_is_not_started_again(amqp_url: str) -> None:
    async with opened(amqp_url) as bus:
        await bus.declare([PAYMENTS])
        received = Received()
        await bus.consume(PAYMENTS.name, received, prefetch=1)
        for _ in range(3):
            assert await bus._reconcile() == {}
        for body in (b"[1]", b"[2]"):
            await publish_until_confirmed(bus, Outgoing(CHARGE, body))
        delivery = await received.next()
        for _ in range(3):
            assert await bus._reconcile() == {}
        await delivery.ack()
        await (await received.next()).ack()


async def test_f23_what_the_watchdog_cannot_mend_is_a_problem_until_it_can(amqp_url: str) -> None:
    async with opened(amqp_url, watch_every=0.05, reconcile_every=0.05) as bus, wire(amqp_url) as channel:
        await bus.declare([PAYMENTS, Queue("mail", (MAIL,))])
        await channel.queue_delete("saga.mail")
        await channel.declare_queue("saga.mail", durable=True)  # a classic one
        await until(lambda: "saga.mail exists with other properties" in (bus.problem or ""))
        await channel.queue_delete("saga.mail")
        await until(lambda: bus.problem is None)


async def test_f23_a_consumer_that_was_cancelled_on_purpose_is_left_alone(amqp_url: str) -> None:
    async with opened(amqp_url) as bus:
        await bus.declare([PAYMENTS])
        received = Received()
        consumer = await bus.consume(PAYMENTS.name, received, prefetch=5)
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[1]"))
        delivery = await received.next()
        await consumer.cancel()  # its channel stays open for the delivery
        async with wire(amqp_url) as channel:
            await channel.queue_delete("saga.payments")  # else RabbitMQ counts it until that is settled
        assert await bus._reconcile() == {}
        await delivery.ack()


async def test_f23_a_consumer_that_is_cancelled_while_the_connection_is_lost_does_not_come_back(amqp_url: str) -> None:
    """It would give back whatever it is delivered, until RabbitMQ gives that up."""
    proxy = Proxy(URL(amqp_url))
    async with proxy.running() as url, opened(amqp_url) as publisher, opened(url) as bus:
        await bus.declare([PAYMENTS])
        received = Received()
        consumer = await bus.consume(PAYMENTS.name, received, prefetch=5)
        await publisher.publish([Outgoing(CHARGE, b"[1]")])
        held = await received.next()
        proxy.cut()
        await until(lambda: bus.problem is not None)
        await consumer.cancel()  # the handler is paused, or its breaker has opened
        await until(lambda: bus.problem is None)
        await publisher.publish([Outgoing(CHARGE, b"[2]")])
        again = Received()
        await bus.consume(PAYMENTS.name, again, prefetch=5)  # on a later channel than one that was restored
        deliveries = {delivery.body: delivery for delivery in [await again.next(), await again.next()]}
        assert deliveries.keys() == {b"[1]", b"[2]"}
        async with wire(amqp_url) as channel:
            queue = await channel.declare_queue("saga.payments", passive=True)
            assert queue.declaration_result.consumer_count == 1
        await held.ack()  # does nothing
        assert "x-delivery-count" not in deliveries[b"[2]"].headers


# Channels that RabbitMQ closes (F24)


async def test_f24_a_consumer_whose_channel_is_closed_by_a_precondition_gets_everything(amqp_url: str) -> None:
    async with opened(amqp_url, watch_every=NEVER) as bus, under_load(bus) as ledger:
        [consumer] = bus._consumers
        for _ in range(3):
            assert consumer._channel is not None
            channel = await consumer._channel.get_underlay_channel()
            await channel.basic_ack(1_000_000)  # 406 PRECONDITION_FAILED: unknown delivery tag
            await asyncio.wait([channel.closing])
            await ledger.confirms(100)


async def test_f24_a_publisher_whose_channel_is_closed_by_a_precondition_goes_on(amqp_url: str) -> None:
    async with opened(amqp_url, watch_every=NEVER) as bus, under_load(bus) as ledger:
        for _ in range(3):
            assert bus._publisher is not None
            channel = await bus._publisher.get_underlay_channel()
            await channel.basic_ack(1_000_000)
            await asyncio.wait([channel.closing])
            await bus.until_writable()
            await ledger.confirms(100)


async def test_f24_a_delivery_that_is_held_for_too_long_comes_again(
    impatient_rabbitmq: RabbitMQ, private_amqp_url: str
) -> None:
    assert impatient_rabbitmq.running
    async with opened(private_amqp_url, watch_every=NEVER) as bus:
        await bus.declare([PAYMENTS])
        received = Received()
        await bus.consume(PAYMENTS.name, received, prefetch=5)
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[1]"))
        late = await received.next()
        again = await received.next()
        assert (again.body, again.redelivered) == (b"[1]", True)
        await late.ack()  # does nothing
        await again.ack()
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[2]"))
        while (delivery := await received.next()).body != b"[2]":
            await delivery.ack()


# Limits are reached (F25)


async def test_f25_a_full_queue_is_an_error_and_not_unroutable(amqp_url: str) -> None:
    async with opened(amqp_url, watch_every=NEVER) as bus:
        async with wire(amqp_url) as channel:
            queue = await channel.declare_queue(
                "full", durable=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}
            )
            await queue.bind("saga.commands", CHARGE.key)
            errors = await bus.publish([Outgoing(CHARGE, b"[1]")] * 5)
        refused = [error for error in errors if error is not None]
        assert len(refused) == 4
        assert not any(isinstance(error, UnroutableError) for error in refused)


async def test_f25_what_a_full_queue_refuses_arrives_as_it_is_emptied(amqp_url: str, engine: AsyncEngine) -> None:
    async with opened(amqp_url, watch_every=NEVER) as bus, wire(amqp_url) as channel, relaying(engine, bus) as relay:
        queue = await channel.declare_queue(
            "full", durable=True, arguments={"x-max-length": 2, "x-overflow": "reject-publish"}
        )
        await queue.bind("saga.commands", CHARGE.key)
        load = Load(engine, relay)
        await load.commit(10)
        arrived: set[str] = set()
        async with asyncio.timeout(60):
            while len(arrived) < 10:
                if message := await queue.get(fail=False, no_ack=True):
                    arrived |= {envelope.id for envelope in envelopes(message.body)}
        await load.is_published()


async def test_f25_what_comes_back_too_often_is_a_dead_letter_and_does_not_hold_others_up(amqp_url: str) -> None:
    async with opened(amqp_url, delivery_limit=2, watch_every=NEVER) as bus:
        await bus.declare([PAYMENTS])
        received = Received()

        def refuse_poison(delivery: Any) -> None:
            if delivery.body == b'["poison"]':
                raise ValueError("poison")
            received(delivery)

        await bus.consume(PAYMENTS.name, refuse_poison, prefetch=5)
        await bus.publish([Outgoing(CHARGE, b'["poison"]'), Outgoing(CHARGE, b"[1]")])
        await (await received.next()).ack()
        await dead_letters_arrive(amqp_url, {b'["poison"]'})


async def dead_letters_arrive(url: str, bodies: set[bytes]) -> None:
    missing = set(bodies)
    async with wire(url) as channel, asyncio.timeout(60):
        queue = await channel.get_queue("saga.dead-letters.tests")
        async with queue.iterator() as messages:
            async for message in messages:
                await message.ack()
                missing.discard(message.body)
                if not missing:
                    return


# Nobody takes the dead letters (F26)


async def test_f26_a_dead_letter_without_a_queue_is_kept_until_the_queue_is_made_again(
    impatient_rabbitmq: RabbitMQ, private_amqp_url: str
) -> None:
    assert impatient_rabbitmq.running
    async with opened(private_amqp_url, delivery_limit=1, watch_every=NEVER) as bus:
        await bus.declare([PAYMENTS, Queue("mail", (MAIL,))])
        refusals = 0

        def refuse(_: object) -> None:
            nonlocal refusals
            refusals += 1
            raise ValueError("poison")

        async with wire(private_amqp_url) as channel:
            await channel.queue_delete("saga.dead-letters.tests")
        await bus.consume(PAYMENTS.name, refuse, prefetch=5)
        await publish_until_confirmed(bus, Outgoing(CHARGE, b'["poison"]'))
        await until(lambda: refusals == 2)  # one more than the limit
        await publish_until_confirmed(bus, Outgoing(MAIL, b"[1]"))  # RabbitMQ has had the time to find nobody
        assert await bus._reconcile() == {}  # what the watchdog would do each half a minute
        await dead_letters_arrive(private_amqp_url, {b'["poison"]'})


async def test_f26_dead_letters_that_their_queue_refuses_are_kept_until_the_others_are_taken(
    impatient_rabbitmq: RabbitMQ, private_amqp_url: str
) -> None:
    vhost = URL(private_amqp_url).path.removeprefix("/")
    full = {
        "pattern": r"saga\.dead-letters.*",
        "apply-to": "queues",
        "definition": {"max-length": 1, "overflow": "reject-publish"},
    }
    async with opened(private_amqp_url, delivery_limit=1, watch_every=NEVER) as bus:
        await bus.declare([PAYMENTS])
        await asyncio.to_thread(impatient_rabbitmq.manage, "PUT", f"policies/{vhost}/full", full)
        refusals = 0

        def refuse(_: object) -> None:
            nonlocal refusals
            refusals += 1
            raise ValueError("poison")

        await bus.consume(PAYMENTS.name, refuse, prefetch=5)
        poison = [b'["%d"]' % number for number in range(6)]
        for body in poison:
            await publish_until_confirmed(bus, Outgoing(CHARGE, body))
        await until(lambda: refusals == 2 * len(poison))  # one more than the limit
        await dead_letters_arrive(private_amqp_url, set(poison))


# The password changes (F27)


async def test_f27_after_a_change_of_the_password_only_the_right_one_brings_the_bus_back(
    private_rabbitmq: RabbitMQ, private_amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def set_password(password: str) -> None:
        private_rabbitmq.manage("PUT", "users/saga", {"password": password, "tags": ""})

    vhost = URL(private_amqp_url).path.removeprefix("/")
    await asyncio.to_thread(set_password, "secret-word")
    await asyncio.to_thread(give, private_rabbitmq, vhost, "saga", configure=".*", write=".*", read=".*")
    url = str(URL(private_amqp_url).with_user("saga").with_password("secret-word"))
    with caplog.at_level(logging.INFO):
        async with opened(url, watch_every=NEVER) as bus, under_load(bus) as ledger:
            await asyncio.to_thread(set_password, "other-word")
            await ledger.confirms(50)  # an open connection is not asked again
            refusals = asyncio.Event()

            class Refusal(logging.Handler):
                def emit(self, record: logging.LogRecord) -> None:
                    if "ACCESS_REFUSED" in record.getMessage():
                        refusals.set()

            library = logging.getLogger("aio_pika")
            library.addHandler(handler := Refusal())
            await control(private_rabbitmq, "close_all_user_connections", "saga", "credentials revoked")
            async with asyncio.timeout(60):
                await refusals.wait()
            library.removeHandler(handler)
            assert "is lost" in (bus.problem or "")
            [error] = await bus.publish([Outgoing(CHARGE, b"[-1]")])
            assert isinstance(error, PublishError)
            await asyncio.to_thread(set_password, "secret-word")
            await ledger.confirms(100)
            assert bus.problem is None
    assert "secret-word" not in caplog.text


async def test_f27_a_new_password_is_taken_from_the_settings_while_the_process_runs(
    private_rabbitmq: RabbitMQ,
    private_amqp_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    vhost = URL(private_amqp_url).path.removeprefix("/")
    file = tmp_path / "COORDINATOR_BROKER_URL"

    def rotate(password: str) -> None:
        private_rabbitmq.manage("PUT", "users/rotating", {"password": password, "tags": ""})
        file.write_text(str(URL(private_amqp_url).with_user("rotating").with_password(password)) + "\n")

    await asyncio.to_thread(rotate, "first-word")
    await asyncio.to_thread(give, private_rabbitmq, vhost, "rotating", configure=".*", write=".*", read=".*")
    monkeypatch.delenv("COORDINATOR_BROKER_URL", raising=False)
    monkeypatch.setenv("COORDINATOR_SECRETS", str(tmp_path))
    settings = load_settings()
    url = settings.broker_url.get_secret_value()
    assert "first-word" in url
    bus = RabbitMQBus(
        url,
        read_url=settings.read_broker_url,
        application="tests",
        clock=SystemClock(),
        ids=TimeOrderedIds(),
        options=RabbitMQOptions(watch_every=0.1),
    )
    await bus.open()
    try:
        async with under_load(bus) as ledger:
            await asyncio.to_thread(rotate, "second-word")
            await control(private_rabbitmq, "close_all_user_connections", "rotating", "credentials revoked")
            await until(lambda: bus.problem is not None)
            await ledger.confirms(100)
            assert bus.problem is None
            await asyncio.to_thread(rotate, "third-word")
            file.write_text("half a li")  # the URL that there was is kept
            await control(private_rabbitmq, "close_all_user_connections", "rotating", "once more")
            await until(lambda: "bus.url_not_renewed" in actions(caplog))
            await asyncio.to_thread(rotate, "fourth-word")
            await ledger.confirms(100)
    finally:
        await bus.close()
    assert "-word" not in caplog.text


# Somebody who has no business here (F50)


def give(broker: RabbitMQ, vhost: str, user: str, *, configure: str, write: str, read: str) -> None:
    """Set permissions, as `rabbitmqctl set_permissions` does."""
    permissions = {"configure": configure, "write": write, "read": read}
    broker.manage("PUT", f"permissions/{vhost}/{user}", permissions)


async def test_f50_a_service_that_may_only_publish_events_can_forge_no_command_and_no_reply(
    private_rabbitmq: RabbitMQ, private_amqp_url: str
) -> None:
    """With the permissions of docs/guarantees.md. RabbitMQ refuses; what it may do goes on."""
    vhost = URL(private_amqp_url).path.removeprefix("/")
    private_rabbitmq.manage("PUT", "users/catalog", {"password": "catalog-word", "tags": ""})
    exchanges = r"^saga\.(events|commands|replies)$"
    give(private_rabbitmq, vhost, "catalog", configure=exchanges, write=r"^saga\.events$", read="^$")
    url = str(URL(private_amqp_url).with_user("catalog").with_password("catalog-word"))
    placed, reply = Address(Exchange.EVENTS, "order.placed"), Address(Exchange.REPLIES, "coordinator")
    async with opened(private_amqp_url) as bus:
        await bus.declare([PAYMENTS, Queue("coordinator.replies", (reply,)), Queue("orders", (placed,))])
        theirs = RabbitMQBus(url, clock=SystemClock(), ids=TimeOrderedIds())
        await theirs.open()
        try:
            for forged in (CHARGE, reply):
                [error] = await theirs.publish([Outgoing(forged, b'["forged"]')])
                assert isinstance(error, PublishError)
                await theirs.until_writable()
            await publish_until_confirmed(theirs, Outgoing(placed, b"[1]"))
        finally:
            await theirs.close()
        async with wire(url) as channel:
            with pytest.raises(ChannelAccessRefused):
                await (await channel.get_queue("saga.payments", ensure=False)).get(no_ack=True)
        counts = {}
        async with wire(private_amqp_url) as channel:
            for name in ("payments", "coordinator.replies", "orders"):
                queue = await channel.declare_queue(f"saga.{name}", passive=True)
                counts[name] = queue.declaration_result.message_count
    assert counts == {"payments": 0, "coordinator.replies": 0, "orders": 1}
