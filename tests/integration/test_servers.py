"""The servers and the collector that other tests build on."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pika  # type: ignore[import-untyped]  # ships no types
import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.support.base import free_port, own_ports
from tests.support.otlp import OtlpSink
from tests.support.servers import Postgres, RabbitMQ


@contextmanager
def open_channel(url: str) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
    with closing(pika.BlockingConnection(pika.URLParameters(url))) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


def declare(url: str, queue: str) -> None:
    with open_channel(url) as channel:
        channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})


def publish(url: str, queue: str, body: bytes) -> None:
    with open_channel(url) as channel:
        channel.basic_publish("", queue, body, pika.BasicProperties(delivery_mode=2), mandatory=True)


def get(url: str, queue: str) -> bytes | None:
    with open_channel(url) as channel:
        body: bytes | None = channel.basic_get(queue, auto_ack=True)[2]
        return body


async def execute(url: str, *statements: str) -> object:
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            for statement in statements[:-1]:
                await connection.execute(text(statement))
            return (await connection.execute(text(statements[-1]))).scalar_one()
    finally:
        await engine.dispose()


def test_no_port_is_given_twice_before_anything_listens_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker with one port for two of its listeners does not start."""
    drawn = iter([free := free_port(), free, free, free + 1, free + 2, free + 3])
    monkeypatch.setattr(random, "choice", lambda _ports: next(drawn))

    assert free not in {free_port(), free_port()}


def test_processes_that_run_tests_side_by_side_give_different_ports() -> None:
    def of(number: int) -> set[int]:
        return set(own_ports({"PYTEST_XDIST_WORKER_COUNT": "2", "PYTEST_XDIST_WORKER": f"gw{number}"}))

    assert not of(0) & of(1)
    assert of(0) | of(1) == set(own_ports({}))
    assert of(2) == of(0), "a worker that takes the place of one which crashed has the next number"


def test_what_is_published_can_be_got(amqp_url: str, namespace: str) -> None:
    declare(amqp_url, namespace)
    publish(amqp_url, namespace, b"hello")

    assert get(amqp_url, namespace) == b"hello"


def test_virtual_hosts_are_separate_and_removed(rabbitmq: RabbitMQ) -> None:
    if rabbitmq.management_url is None:
        pytest.skip("the given broker has no management API")
    with rabbitmq.vhost() as one, rabbitmq.vhost() as other:
        declare(one, "tasks")
        publish(one, "tasks", b"for one")
        declare(other, "tasks")

        assert get(other, "tasks") is None
        assert get(one, "tasks") == b"for one"

    with pytest.raises(pika.exceptions.AMQPConnectionError):
        get(one, "tasks")


def test_a_broker_keeps_confirmed_messages_when_it_is_killed(private_rabbitmq: RabbitMQ) -> None:
    url = private_rabbitmq.url
    declare(url, "tasks")
    private_rabbitmq.flush()
    publish(url, "tasks", b"survives")

    private_rabbitmq.kill9()
    private_rabbitmq.start()

    assert private_rabbitmq.url == url
    assert get(url, "tasks") == b"survives"


async def test_each_database_url_leads_to_an_empty_database(database_url: str) -> None:
    assert await execute(database_url, "CREATE TABLE things (id INTEGER)", "SELECT count(*) FROM things") == 0


async def test_a_database_server_keeps_committed_rows_when_it_is_killed(
    private_postgres: Postgres, private_pg_url: str
) -> None:
    written = await execute(
        private_pg_url, "CREATE TABLE things (id INTEGER)", "INSERT INTO things VALUES (7) RETURNING id"
    )

    private_postgres.kill9()
    private_postgres.start()

    assert await execute(private_pg_url, "SELECT id FROM things") == written


def test_a_stopped_database_server_starts_again(private_postgres: Postgres) -> None:
    private_postgres.stop()

    assert not private_postgres.running

    private_postgres.start()

    assert private_postgres.answers()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_the_collector_sees_one_tree_over_two_services(otlp: OtlpSink, protocol: str) -> None:
    def exporter() -> SpanExporter:
        if protocol == "grpc":
            return GrpcExporter(endpoint=otlp.grpc_endpoint, insecure=True)
        return HttpExporter(endpoint=f"{otlp.http_endpoint}/v1/traces")

    shop, bank = (TracerProvider(resource=Resource({"service.name": name})) for name in ("shop", "bank"))
    for provider in (shop, bank):
        provider.add_span_processor(SimpleSpanProcessor(exporter()))

    def trade() -> None:
        with shop.get_tracer("test").start_as_current_span("order"):
            with bank.get_tracer("test").start_as_current_span("charge", attributes={"amount": 5}):
                pass
            with shop.get_tracer("test").start_as_current_span("ship"):
                pass

    await asyncio.to_thread(trade)
    spans = await asyncio.to_thread(otlp.wait, lambda spans: len(spans) == 3)
    shop.shutdown()
    bank.shutdown()

    assert otlp.tree(spans[0].trace_id) == ("shop", "order", [("bank", "charge", []), ("shop", "ship", [])])
    assert [span.attributes for span in spans if span.name == "charge"] == [{"amount": 5}]


def test_the_collector_refuses_a_trace_with_a_gap(otlp: OtlpSink) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(GrpcExporter(endpoint=otlp.grpc_endpoint, insecure=True)))
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("parent, sent last"), tracer.start_as_current_span("child"):
        pass
    provider.shutdown()
    lone = next(span for span in otlp.spans if span.name == "child")
    otlp._spans.remove(next(span for span in otlp.spans if span.span_id == lone.parent_id))

    with pytest.raises(AssertionError, match="roots"):
        otlp.tree(lone.trace_id)
