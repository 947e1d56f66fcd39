"""What only RabbitMQ can do to us: restarts, lost queues, other people's queues, a broker that stops answering."""

import asyncio
import logging
import struct
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import aio_pika
import pika  # type: ignore[import-untyped]  # pika ships no types
import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.aio_pika import AioPikaInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from yarl import URL

from events import tracing
from events.bus import DEAD_LETTERS, Address, Exchange, Outgoing, Queue
from events.clock import SystemClock
from events.errors import BusClosedError, ConfigurationError, PublishError, UnroutableError
from events.ids import TimeOrderedIds
from events.rabbitmq import RabbitMQBus, RabbitMQOptions
from events.rabbitmq_wire import UNDECODABLE
from tests.support.proxy import Proxy
from tests.support.rabbitmq import CHARGE, PAYMENTS, Received, new_bus, opened, publish_until_confirmed, until, wire
from tests.support.servers import RabbitMQ

pytestmark = pytest.mark.rabbitmq

PLACED = Address(Exchange.EVENTS, "order.placed")
ONE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TWO = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
async def proxy(amqp_url: str) -> Proxy:
    return Proxy(URL(amqp_url))


async def test_publishing_fails_at_once_while_the_broker_is_down(
    private_rabbitmq: RabbitMQ, private_amqp_url: str
) -> None:
    async with opened(private_amqp_url) as bus:
        await bus.declare([PAYMENTS])
        await asyncio.to_thread(private_rabbitmq.kill9)
        async with asyncio.timeout(5):
            for _ in range(10):
                errors = await bus.publish([Outgoing(CHARGE, b"[1]")] * 100)
                assert all(isinstance(error, PublishError) for error in errors)


async def test_a_broker_that_stops_answering_ends_a_publish_with_an_error(proxy: Proxy) -> None:
    """A stalled connection raises CancelledError out of aio-pika, which no `except Exception` sees."""
    async with proxy.running() as url, opened(f"{url}?heartbeat=1", publish_timeout=60) as bus:
        await bus.declare([PAYMENTS])
        received = Received()
        await bus.consume("payments", received, prefetch=1)
        proxy.hold()
        async with asyncio.timeout(30):
            errors = await bus.publish([Outgoing(CHARGE, b"[1]"), Outgoing(CHARGE, b"[2]")])
        assert all(isinstance(error, PublishError) for error in errors)
        proxy.release()
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[3]"))
        while (delivery := await received.next()).body != b"[3]":
            await delivery.ack()


async def test_a_broker_that_does_not_confirm_is_asked_with_one_message_at_a_time(proxy: Proxy, amqp_url: str) -> None:
    async with proxy.running() as url, opened(url, publish_timeout=0.3) as bus:
        await bus.declare([PAYMENTS])
        proxy.hold()
        async with asyncio.timeout(5):
            first = await bus.publish([Outgoing(CHARGE, b"[1]")] * 1000)
            second = await bus.publish([Outgoing(CHARGE, b"[2]")] * 1000)
        assert all(isinstance(error, PublishError) for error in (*first, *second))
        assert bus.problem is not None
        proxy.release()
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[3]"))
        assert bus.problem is None
        async with wire(amqp_url) as channel:
            queue = await channel.declare_queue("saga.payments", passive=True)
            # At most the 64 that were in flight, one probe for each later attempt, and the last.
            assert (queue.declaration_result.message_count or 0) < 100


async def test_a_broker_that_did_not_confirm_is_no_longer_a_problem_on_a_new_connection(proxy: Proxy) -> None:
    """A process that has nothing to publish for a while would call itself ill meanwhile."""
    async with proxy.running() as url, opened(url, publish_timeout=0.2) as bus:
        await bus.declare([PAYMENTS])
        proxy.hold()
        await bus.publish([Outgoing(CHARGE, b"[1]")])
        proxy.release()
        assert bus.problem == "RabbitMQ does not confirm what is published"
        assert bus._publishing is not None
        assert bus._publishing.transport is not None
        await bus._publishing.transport.connection.close(ConnectionError("test"))
        await until(lambda: bus.problem is None)


async def test_a_broker_that_did_not_confirm_is_no_problem_of_a_process_that_has_long_published_nothing(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a process that only publishes, and had nothing to say, was not ready until it had."""
    async with proxy.running() as url, opened(url, publish_timeout=0.2) as bus:
        await bus.declare([PAYMENTS])
        proxy.hold()
        await bus.publish([Outgoing(CHARGE, b"[1]")])
        proxy.release()
        assert bus.problem == "RabbitMQ does not confirm what is published"
        later = SystemClock().monotonic() + 60
        monkeypatch.setattr(bus._clock, "monotonic", lambda: later)
        assert bus.problem is None


async def test_cancelling_a_publish_is_not_taken_for_a_lost_connection(proxy: Proxy) -> None:
    async with proxy.running() as url, opened(url) as bus:
        await bus.declare([PAYMENTS])
        proxy.hold()
        for count in (1, 100):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await bus.publish([Outgoing(CHARGE, b"[1]")] * count)
        proxy.release()
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[2]"))


async def test_settling_and_cancelling_on_a_dead_line_end_in_time(proxy: Proxy) -> None:
    async with proxy.running() as url, opened(url, publish_timeout=0.2, connect_timeout=1) as bus:
        await bus.declare([PAYMENTS])
        received = Received()
        consumer = await bus.consume("payments", received, prefetch=100)
        await bus.publish([Outgoing(CHARGE, b"[1]")] * 100)
        deliveries = [await received.next() for _ in range(100)]
        proxy.hold()
        async with asyncio.timeout(20):
            await asyncio.gather(*(delivery.ack() for delivery in deliveries))
            await consumer.cancel()
            await bus.close()


async def test_settling_on_a_line_that_takes_no_more_bytes_ends_in_time(amqp_url: str) -> None:
    class FullLine:
        async def basic_ack(self, *_: Any, **__: Any) -> None:
            await asyncio.Event().wait()

    async with opened(amqp_url, publish_timeout=0.2) as bus:
        await bus.declare([PAYMENTS])
        received = Received()
        await bus.consume("payments", received, prefetch=1)
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[1]"))
        delivery: Any = await received.next()
        delivery._channel = FullLine()
        async with asyncio.timeout(5):
            await delivery.ack()


async def test_publishing_does_not_wait_for_a_connection_that_is_on_its_way_back(amqp_url: str) -> None:
    async with opened(amqp_url) as bus:
        await bus.declare([PAYMENTS])
        assert bus._publishing is not None
        bus._publishing.connected.clear()  # aio-pika would wait for this, outside of the timeout
        async with asyncio.timeout(5):
            [error] = await bus.publish([Outgoing(CHARGE, b"[1]")])
        assert isinstance(error, PublishError)
        bus._publishing.connected.set()


async def test_closing_while_the_broker_is_down_is_quick_and_silent(
    private_rabbitmq: RabbitMQ, private_amqp_url: str
) -> None:
    bus = new_bus(private_amqp_url)
    await bus.open()
    await bus.declare([PAYMENTS])
    await bus.consume("payments", Received(), prefetch=1)
    await asyncio.to_thread(private_rabbitmq.kill9)
    async with asyncio.timeout(5):
        await bus.close()
        await bus.close()


async def test_queues_deleted_during_a_lost_connection_are_declared_again(amqp_url: str) -> None:
    mail = Address(Exchange.COMMANDS, "send.mail")
    async with opened(amqp_url) as bus:
        await bus.declare([PAYMENTS, Queue("mail", (mail,))])
        received = Received()
        await bus.consume("payments", received, prefetch=5)
        async with wire(amqp_url) as channel:
            # In one go with the deletions, so that aio-pika sees the lost connection first.
            connection = bus._consuming
            assert connection is not None
            assert connection.transport is not None
            connection.connected.clear()
            await asyncio.gather(
                connection.transport.connection.close(ConnectionError("test")),
                channel.queue_delete("saga.payments"),
                channel.queue_delete("saga.mail"),
            )
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[1]"))
        await (await received.next()).ack()
        await publish_until_confirmed(bus, Outgoing(mail, b"[2]"))  # nobody consumes this one


async def test_a_consumer_whose_channel_is_not_restored_is_started_again(
    amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(amqp_url, watch_every=0.05) as bus:
        await bus.declare([PAYMENTS])
        received = Received()
        consumer: Any = await bus.consume("payments", received, prefetch=5)
        await consumer._channel.close()
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[1]"))
        await (await received.next()).ack()
        assert "bus.restarted" in [getattr(record, "action", None) for record in caplog.records]


async def test_a_publisher_whose_channel_is_not_restored_is_started_again(amqp_url: str) -> None:
    async with opened(amqp_url, watch_every=0.05) as bus:
        await bus.declare([PAYMENTS])
        assert bus._publisher is not None
        await bus._publisher.close()
        assert bus.problem is not None
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[1]"))
        assert bus.problem is None


async def test_a_declarer_whose_channel_is_not_restored_is_started_again(amqp_url: str) -> None:
    async with opened(amqp_url, watch_every=0.05) as bus:
        await bus.declare([PAYMENTS])
        assert bus._declarer is not None
        await bus._declarer.close()
        async with wire(amqp_url) as channel:
            await channel.queue_delete("saga.payments")
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[1]"))


async def test_an_exchange_that_was_deleted_is_made_again(amqp_url: str) -> None:
    async with opened(amqp_url) as bus:
        async with wire(amqp_url) as channel:
            await channel.exchange_delete("saga.events")
        errors = await bus.publish([Outgoing(PLACED, b"[1]")] * 3)
        assert all(isinstance(error, PublishError) for error in errors)
        await publish_until_confirmed(bus, Outgoing(PLACED, b"[2]"))


async def test_a_cancelled_consumer_gives_its_channel_back(amqp_url: str) -> None:
    async with opened(amqp_url) as bus:
        await bus.declare([PAYMENTS])
        assert bus._consuming is not None
        assert bus._consuming.transport is not None
        channels = bus._consuming.transport.connection.channels
        before = len(channels)
        for _ in range(20):
            await (await bus.consume("payments", Received(), prefetch=1)).cancel()
        assert len(channels) == before

        received = Received()
        consumer = await bus.consume("payments", received, prefetch=2)
        await publish_until_confirmed(bus, Outgoing(CHARGE, b"[1]"))
        delivery = await received.next()
        await consumer.cancel()
        assert len(channels) == before + 1
        await delivery.ack()
        assert len(channels) == before


async def test_a_queue_with_other_properties_is_a_configuration_error_that_names_it(amqp_url: str) -> None:
    async with wire(amqp_url) as channel:
        await channel.declare_queue("saga.payments", durable=True)
    async with opened(amqp_url) as bus:
        with pytest.raises(ConfigurationError, match=r"saga\.payments"):
            await bus.declare([PAYMENTS])
        await bus.declare([Queue("mail", (PLACED,))])
        await publish_until_confirmed(bus, Outgoing(PLACED, b"[1]"))


async def test_an_exchange_with_other_properties_is_a_configuration_error_that_names_it(amqp_url: str) -> None:
    async with wire(amqp_url) as channel:
        await channel.declare_exchange("saga.events", "fanout", durable=True)
    with pytest.raises(ConfigurationError, match=r"saga\.events"):
        await new_bus(amqp_url).open()


async def test_namespaces_keep_deployments_apart(amqp_url: str) -> None:
    clock, ids = SystemClock(), TimeOrderedIds()
    one, other = (
        RabbitMQBus(amqp_url, namespace=name, application="tests", clock=clock, ids=ids) for name in ("one", "other")
    )
    try:
        await one.open()
        await other.open()
        await one.declare([PAYMENTS])
        [error] = await other.publish([Outgoing(CHARGE, b"[1]")])
        assert isinstance(error, UnroutableError)
    finally:
        await one.close()
        await other.close()


async def test_what_rabbitmq_gives_up_on_goes_to_the_application_whose_queue_it_was_in(amqp_url: str) -> None:
    """They may have databases of their own: letters of one were kept, or lost, in that of the other."""
    options = RabbitMQOptions(delivery_limit=1)
    async with AsyncExitStack() as stack:
        parties: list[tuple[str, Address, RabbitMQBus, Received]] = []
        for name, address in (("one", CHARGE), ("other", PLACED)):
            bus = RabbitMQBus(amqp_url, application=name, clock=SystemClock(), ids=TimeOrderedIds(), options=options)
            stack.push_async_callback(bus.close)
            await bus.open()
            await bus.declare([Queue(f"of.{name}", (address,))])
            received = Received()
            await bus.consume(DEAD_LETTERS, received, prefetch=9)
            await bus.consume(f"of.{name}", refuse, prefetch=9)
            parties.append((name, address, bus, received))
        for name, address, bus, _ in parties:
            assert not any(await bus.publish([Outgoing(address, name.encode())] * 9))
        for name, _, _, received in parties:
            assert {(await received.next()).body for _ in range(9)} == {name.encode()}


async def test_two_applications_cannot_have_handlers_of_one_name(amqp_url: str) -> None:
    """They would take each other's messages."""
    async with AsyncExitStack() as stack:
        for name in ("one", "other"):
            bus = RabbitMQBus(amqp_url, application=name, clock=SystemClock(), ids=TimeOrderedIds())
            stack.push_async_callback(bus.close)
            await bus.open()
            if name == "one":
                await bus.declare([PAYMENTS])
                continue
            with pytest.raises(ConfigurationError, match=r"saga\.payments exists .* give the handler another name"):
                await bus.declare([PAYMENTS])


def refuse(_: object) -> None:
    raise ValueError("poison")


async def test_a_bus_of_no_application_declares_no_queue(amqp_url: str) -> None:
    """What only publishes would make a queue of dead letters that nobody takes."""
    bus = RabbitMQBus(amqp_url, clock=SystemClock(), ids=TimeOrderedIds())
    await bus.open()
    try:
        with pytest.raises(ConfigurationError, match="queue payments belongs to no application"):
            await bus.declare([PAYMENTS])
    finally:
        await bus.close()


async def test_a_message_that_cannot_be_encoded_spoils_only_itself(amqp_url: str) -> None:
    async with opened(amqp_url) as bus:
        await bus.declare([PAYMENTS])
        too_long = Address(Exchange.COMMANDS, "x" * 300)
        results = await bus.publish([Outgoing(CHARGE, b"[1]"), Outgoing(too_long, b"[2]"), Outgoing(CHARGE, b"[3]")])
        assert [result is None for result in results] == [True, False, True]


async def test_each_publish_attempt_is_persistent_and_has_an_id_of_its_own(amqp_url: str) -> None:
    async with opened(amqp_url) as bus:
        await bus.declare([PAYMENTS])
        await bus.publish([Outgoing(CHARGE, b"[1]")] * 2)
        async with wire(amqp_url) as channel:
            queue = await channel.declare_queue("saga.payments", passive=True)
            messages = [await queue.get(no_ack=True, timeout=10) for _ in range(2)]
        assert [message.delivery_mode for message in messages] == [aio_pika.DeliveryMode.PERSISTENT] * 2
        assert len({message.message_id for message in messages}) == 2
        assert all(message.message_id for message in messages)


class DeepHeaders(pika.BasicProperties):  # type: ignore[misc]  # pika ships no types
    """Headers nested more deeply than a recursive decoder can follow."""

    def encode(self) -> list[bytes]:
        table = b""
        for _ in range(1500):
            table = b"\x01aF" + struct.pack(">I", len(table)) + table
        return [struct.pack(">HI", self.FLAG_HEADERS, len(table)), table]


HOSTILE = (
    pika.BasicProperties(timestamp=2**62),
    pika.BasicProperties(content_type=b"\xff\xfe"),
    pika.BasicProperties(message_id=b"\xc3\x28"),
    pika.BasicProperties(headers={"at": 1, "big": 2**62, "raw": b"\xff"}),
    DeepHeaders(),
)


HOSTILE_TRACES = (
    pika.BasicProperties(headers={"traceparent": 5}),
    pika.BasicProperties(headers={"traceparent": [5]}),
    pika.BasicProperties(headers={"traceparent": b"\xff"}),
    pika.BasicProperties(headers={"traceparent": ONE, "tracestate": 7}),
    pika.BasicProperties(headers={"baggage": {"a": 1}}),
)


def publish_hostile(url: str, hostile: Sequence[pika.BasicProperties]) -> None:
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        for number, properties in enumerate(hostile):
            channel.basic_publish("saga.events", b"order.\xff", f"[{number}]".encode(), properties, mandatory=True)


async def test_hostile_properties_do_not_cost_the_connection(amqp_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """aiormq drops the connection over each of these, again and again, and takes the neighbours along."""
    async with opened(amqp_url) as bus:
        await bus.declare([Queue("all", (Address(Exchange.EVENTS, "#"),))])
        await asyncio.to_thread(publish_hostile, amqp_url, HOSTILE)
        received = Received()
        with caplog.at_level(logging.WARNING):
            await bus.consume("all", received, prefetch=50)
            deliveries = [await received.next() for _ in HOSTILE]
        by_body = {delivery.body: delivery for delivery in deliveries}
        assert sorted(by_body) == [b"[0]", b"[1]", b"[2]", b"[3]", b"[4]"]
        assert not any(delivery.redelivered for delivery in deliveries)
        assert UNDECODABLE in by_body[b"[0]"].headers
        assert by_body[b"[3]"].headers["at"] == 1
        assert UNDECODABLE in by_body[b"[4]"].headers
        for delivery in deliveries:
            await delivery.ack()


async def test_where_there_is_no_broker_opening_says_so_at_once(unused_tcp_port: int) -> None:
    bus = new_bus(f"amqp://guest:secret-word@127.0.0.1:{unused_tcp_port}/")
    with pytest.raises(BusClosedError, match=f"127.0.0.1:{unused_tcp_port}") as caught:
        await bus.open()
    assert "secret-word" not in str(caught.value)
    await bus.close()


async def test_a_host_that_does_not_answer_is_given_up_on(unused_tcp_port: int) -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the other side goes
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", unused_tcp_port) as server:
        with pytest.raises(BusClosedError, match="did not answer"):
            await new_bus(f"amqp://127.0.0.1:{unused_tcp_port}/", connect_timeout=0.3).open()
        server.close()


async def test_a_wrong_password_or_vhost_is_a_configuration_error_without_the_password(
    amqp_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    url = URL(amqp_url)
    for wrong in (url.with_password("secret-word"), url.with_password("secret-word").with_user("nobody")):
        with pytest.raises(ConfigurationError) as caught:
            await new_bus(str(wrong)).open()
        assert "secret-word" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="no-such-vhost"):
        await new_bus(str(url.with_path("/no-such-vhost"))).open()
    assert "secret-word" not in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret-word@host/",
        "amqp://user:secret-word@host:port/",
        "amqp://user:secret-word@/",
        "secret-word",
    ],
)
async def test_a_url_that_cannot_be_read_is_refused_without_the_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await new_bus(url).open()
    assert "secret-word" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    instrumentor = AioPikaInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    yield exporter
    instrumentor.uninstrument()
    provider.shutdown()


def named(spans: InMemorySpanExporter, ending: str) -> ReadableSpan:
    [span] = [span for span in spans.get_finished_spans() if span.name.endswith(ending)]
    return span


async def test_a_message_is_published_in_its_own_trace(amqp_url: str, spans: InMemorySpanExporter) -> None:
    async with opened(amqp_url) as bus:
        await bus.declare([PAYMENTS])
        received = Received()
        with trace.get_tracer("test").start_as_current_span("somebody else's work"):
            await bus.publish([Outgoing(CHARGE, b"[1]", traceparent=ONE)])
        await bus.consume("payments", received, prefetch=1)
        delivery = await received.next()
        sent = named(spans, "send")
        assert sent.parent is not None
        assert tracing.span_context(ONE).trace_id == sent.parent.trace_id == sent.context.trace_id
        assert delivery.headers["traceparent"].split("-")[1] == ONE.split("-")[1]


async def test_a_bundle_of_several_traces_is_published_in_a_trace_that_links_to_them(
    amqp_url: str, spans: InMemorySpanExporter
) -> None:
    async with opened(amqp_url) as bus:
        await bus.declare([PAYMENTS])
        await bus.publish([Outgoing(CHARGE, b"[1, 2]", traceparent=ONE, links=(ONE, TWO))])
        bundle, sent = named(spans, "publish bundle"), named(spans, "send")
        assert bundle.parent is None
        assert {link.context.trace_id for link in bundle.links} == {
            tracing.span_context(ONE).trace_id,
            tracing.span_context(TWO).trace_id,
        }
        assert sent.parent is not None
        assert sent.parent.span_id == bundle.context.span_id


@pytest.mark.usefixtures("spans")
async def test_hostile_trace_headers_do_not_cost_a_delivery(amqp_url: str) -> None:
    """The instrumentation raises over them before our callback is called: they would stay unsettled for ever."""
    async with opened(amqp_url) as bus:
        await bus.declare([Queue("all", (Address(Exchange.EVENTS, "#"),))])
        await asyncio.to_thread(publish_hostile, amqp_url, HOSTILE_TRACES)
        received = Received()
        await bus.consume("all", received, prefetch=1)
        for _ in HOSTILE_TRACES:
            await (await received.next()).ack()
