"""A client that knows nothing of this project, only RabbitMQ and CloudEvents, starts sagas and sends rubbish."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

import pika  # type: ignore[import-untyped]  # pika ships no types
import pytest
from cloudevents.core.bindings import rabbitmq
from cloudevents.core.v1.event import CloudEvent
from pydantic import SecretStr
from sqlalchemy import Row, select

from coordinator import App, Saga, sequence, starts_on, step
from coordinator.node import Node
from coordinator.settings import Settings
from coordinator.tables import saga_instance
from events import Command, Event
from events.database import transaction
from events.tables import dead_letter
from handlers import handles
from handlers.tables import inbox
from tests.support.flows import count_rows, until

MAX_BODY = 4096


class TripBooked(Event, version=2):
    trip: str


class ReserveSeat(Command):
    trip: str


@handles(ReserveSeat)
async def reserve_seat(command: ReserveSeat) -> None:
    assert command.trip


class Trip(Saga):
    """One step is enough: what counts is how it starts."""

    trip: str

    @starts_on(TripBooked)
    @classmethod
    def booked(cls, event: TripBooked) -> Self:
        return cls(trip=event.trip)

    @step
    def reserve(self) -> ReserveSeat:
        return ReserveSeat(trip=self.trip)

    flow = sequence(reserve)


app = App("travel", sagas=[Trip], handlers=[reserve_seat])


class Client:
    """A blocking client, in a thread of its own."""

    def __init__(self, url: str, exchange: str) -> None:
        self._url = url
        self._exchange = exchange

    async def publish(self, body: bytes, *, key: str = "trip.booked", **properties: Any) -> None:
        """Publish and wait for the broker's confirm."""
        await asyncio.to_thread(self._publish, body, key, pika.BasicProperties(delivery_mode=2, **properties))

    def _publish(self, body: bytes, key: str, properties: pika.BasicProperties) -> None:
        connection = pika.BlockingConnection(pika.URLParameters(self._url))
        try:
            channel = connection.channel()
            channel.confirm_delivery()
            channel.basic_publish(self._exchange, key, body, properties, mandatory=True)
        finally:
            connection.close()


@dataclass
class Travel:
    """A coordinator that runs, and a client of its broker."""

    node: Node
    client: Client

    async def completed(self, *trips: str) -> None:
        """Wait until just these sagas are there, and completed."""

        async def all_completed() -> bool:
            async with transaction(self.node.engine) as connection:
                rows = (await connection.execute(select(saga_instance.c.key, saga_instance.c.status))).all()
            return sorted((row.key, row.status) for row in rows) == sorted((trip, "completed") for trip in trips)

        await until(all_completed)

    async def dead_letters(self, count: int) -> list[Row[Any]]:
        """Wait until there are `count`."""
        rows: list[Row[Any]] = []

        async def enough() -> bool:
            async with transaction(self.node.engine) as connection:
                rows[:] = (await connection.execute(dead_letter.select().order_by(dead_letter.c.id))).all()
            return len(rows) >= count

        await until(enough)
        assert len(rows) == count
        return rows


@asynccontextmanager
async def running(amqp_url: str, database_url: str, namespace: str) -> AsyncIterator[Travel]:
    settings = Settings(
        broker_url=SecretStr(amqp_url), database_url=SecretStr(database_url), namespace=namespace, max_body=MAX_BODY
    )
    async with Node(app, settings) as node:
        yield Travel(node, Client(amqp_url, f"{namespace}.events"))


@pytest.fixture
async def travel(amqp_url: str, database_url: str, namespace: str) -> AsyncIterator[Travel]:
    async with running(amqp_url, database_url, namespace) as opened:
        yield opened


def event(trip: str, **attributes: Any) -> CloudEvent:
    return CloudEvent(
        {
            "id": f"booking-{trip}",
            "source": "https://booking.example.com",
            "type": "trip.booked",
            "dataschema": "https://booking.example.com/schemas/trip.booked/2",
            "datacontenttype": "application/json",
            "time": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            **attributes,
        },
        {"trip": trip, "unknown": "field"},
    )


def structured(trip: str, **attributes: Any) -> bytes:
    return rabbitmq.to_structured_event(event(trip, **attributes)).body


async def test_each_form_of_a_cloudevent_starts_a_saga(travel: Travel) -> None:
    client = travel.client
    batch = b"[" + structured("batch 1") + b",\n" + structured("batch 2") + b"]"
    await client.publish(batch, content_type="application/cloudevents-batch+json; charset=utf-8")
    await client.publish(structured("structured"), content_type="application/cloudevents+json")
    binary = rabbitmq.to_binary_event(event("binary"))
    await client.publish(binary.body, content_type=binary.content_type, headers=binary.headers)
    colons = {name.replace("ce-", "cloudEvents:"): value for name, value in binary.headers.items()}
    colons["cloudEvents:id"] = "another"
    await client.publish(b'{"trip":"colons"}', content_type="application/json", headers=colons)
    await client.publish(structured("no content type"))

    await travel.completed("batch 1", "batch 2", "structured", "binary", "colons", "no content type")
    assert await travel.dead_letters(0) == []


async def test_a_duplicate_starts_nothing(travel: Travel) -> None:
    for _ in range(3):
        await travel.client.publish(structured("once"))
    await travel.client.publish(structured("twice") + b" ")
    await travel.completed("once", "twice")
    assert await travel.dead_letters(0) == []


good = structured("bad")
UNREADABLE: dict[str, tuple[str, bytes]] = {
    "truncated": ("malformed", good[:-1]),
    "truncated batch": ("malformed", b"[" + good),
    "empty": ("malformed", b""),
    "NaN": ("malformed", good.replace(b'"bad"', b"NaN")),
    "duplicate names": ("malformed", good.replace(b'"trip":', b'"trip": "worse", "trip":')),
    "raw NUL": ("malformed", good.replace(b'"bad"', b'"b\0d"')),
    "escaped NUL": ("malformed", good.replace(b'"bad"', b'"b\\u0000d"')),
    "not UTF-8": ("malformed", good.replace(b'"bad"', b'"b\xe4d"')),
    "lone surrogate": ("malformed", good.replace(b'"bad"', b'"\\ud800"')),
    "byte order mark": ("malformed", b"\xef\xbb\xbf" + good),
    "deep": ("malformed", b"[" * 4000),
    "no CloudEvent": ("malformed", b'{"trip": "bad"}'),
    "oversized": ("too_large", good + b" " * (MAX_BODY - len(good) + 1)),
    "unknown type": ("unknown_type", structured("bad", type="trip.imagined")),
    "newer version": ("newer_version", structured("bad", dataschema="urn:schema:trip.booked:3")),
    "older version": ("invalid", structured("bad", dataschema="urn:schema:trip.booked:1")),
    "wrong field": ("invalid", good.replace(b'"bad"', b'{"secret": "4711"}')),
}


async def test_what_cannot_be_read_is_kept_whole_with_its_reason_and_the_rest_goes_on(travel: Travel) -> None:
    for _, body in UNREADABLE.values():
        await travel.client.publish(body, headers={"sender": "stranger"})
    await travel.client.publish(structured("good"), content_type="application/cloudevents+json")

    letters = await travel.dead_letters(len(UNREADABLE))
    found = {letter.body: letter.reason for letter in letters}
    assert found == {body: reason for reason, body in UNREADABLE.values()}
    assert {letter.consumer for letter in letters} == {"coordinator"}
    assert all(letter.headers["sender"] == "stranger" for letter in letters)
    assert not any("4711" in letter.detail for letter in letters)
    await travel.completed("good")


async def test_a_body_of_the_largest_size_is_read(travel: Travel) -> None:
    await travel.client.publish(good + b" " * (MAX_BODY - len(good)))
    await travel.completed("bad")


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ({"content_type": "text/plain"}, "malformed"),
        ({"content_encoding": "gzip"}, "malformed"),
        ({"headers": {"padding": "x" * (16 * 1024)}}, "too_large"),
    ],
)
async def test_properties_that_are_refused_are_a_reason_too(
    travel: Travel, properties: dict[str, Any], reason: str
) -> None:
    await travel.client.publish(structured("refused"), **properties)
    await travel.client.publish(structured("good"))
    [letter] = await travel.dead_letters(1)
    assert (letter.body, letter.reason) == (structured("refused"), reason)
    assert letter.content_type == properties.get("content_type")
    await travel.completed("good")


async def test_one_bad_event_in_a_batch_is_kept_alone(travel: Travel) -> None:
    bad = b'{"specversion": "1.0" , "type": "trip.booked"}'
    newer = structured("newer", dataschema="urn:schema:trip.booked:9")
    batch = b"[" + b", ".join([structured("first"), bad, newer, structured("last")]) + b"]"
    await travel.client.publish(batch)
    letters = await travel.dead_letters(2)
    found = {(letter.body, letter.reason, letter.message_id, letter.message_type) for letter in letters}
    assert found == {(bad, "malformed", None, None), (newer, "newer_version", "booking-newer", "trip.booked")}
    await travel.completed("first", "last")


async def test_a_handler_takes_commands_of_strangers_and_keeps_what_it_cannot_read(travel: Travel) -> None:
    """The direct exchange for commands is as open as the one for events."""
    commands = Client(travel.client._url, travel.client._exchange.replace(".events", ".commands"))
    await commands.publish(b"\x00\x01", key="reserve.seat", content_type="application/octet-stream")
    command = json.loads(structured("by hand")) | {"type": "reserve.seat", "dataschema": "urn:schema:reserve.seat:1"}
    await commands.publish(json.dumps(command).encode(), key="reserve.seat")

    async def handled() -> bool:
        return await count_rows(travel.node.engine, inbox) == 1

    await until(handled)
    [letter] = await travel.dead_letters(1)
    assert (letter.consumer, letter.body, letter.reason) == ("reserve_seat", b"\x00\x01", "malformed")


@pytest.mark.parametrize("make", [structured, lambda trip: b"[" + structured(trip) + b"]"])
async def test_what_was_sent_while_the_coordinator_was_away_is_taken_when_it_is_back(
    amqp_url: str, database_url: str, namespace: str, make: Callable[[str], bytes]
) -> None:
    async with running(amqp_url, database_url, namespace) as travel:
        await travel.client.publish(make("before"))
        await travel.completed("before")
    await travel.client.publish(make("meanwhile"))
    await travel.client.publish(b"rubbish")
    async with running(amqp_url, database_url, namespace) as travel:
        await travel.completed("before", "meanwhile")
        assert [letter.body for letter in await travel.dead_letters(1)] == [b"rubbish"]
