"""The tap on the wire sees what is wrong, and sees nothing wrong where nothing is."""

from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from pamqp import commands, frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from sqlalchemy import Engine, create_engine

from events.codec import bundle_body
from events.envelope import Envelope
from events.tables import metadata, outbox
from handlers.tables import inbox
from tests.support.proxy import Watch, Way
from tests.support.tap import Tap

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def event(number: int) -> Envelope:
    return Envelope(id=f"e{number}", source="/test", type="charge.card", version=1, data=b"{}", time=NOW)


def said(method: commands.Basic.Publish | commands.Basic.Deliver | commands.Basic.Return, *events: Envelope) -> bytes:
    """The frames of a message; its id is that of its first event."""
    body = bundle_body([each.encode() for each in events])
    header = ContentHeader(body_size=len(body), properties=commands.Basic.Properties(message_id=events[0].id))
    return b"".join(frame.marshal(each, 1) for each in (method, header, ContentBody(body)))


def published(*events: Envelope) -> bytes:
    return said(commands.Basic.Publish(exchange="saga.commands", routing_key="charge.card"), *events)


def delivered(tag: int, *events: Envelope) -> bytes:
    method = commands.Basic.Deliver(consumer_tag="c", delivery_tag=tag, exchange="saga.commands", routing_key="k")
    return said(method, *events)


def returned(*events: Envelope) -> bytes:
    method = commands.Basic.Return(reply_code=312, reply_text="NO_ROUTE", exchange="saga.commands", routing_key="k")
    return said(method, *events)


def acknowledged(tag: int, *, several: bool = False) -> bytes:
    return frame.marshal(commands.Basic.Ack(delivery_tag=tag, multiple=several), 1)


@pytest.fixture
def database() -> Iterator[Engine]:
    made = create_engine("sqlite://")
    metadata.create_all(made)
    yield made
    made.dispose()


@pytest.fixture
def tap(database: Engine) -> Tap:
    return Tap(database)


@pytest.fixture
def see(tap: Tap) -> Watch:
    return tap.watch()


def keep(database: Engine, *events: Envelope) -> None:
    """Write events to the outbox."""
    rows = [
        {
            "id": uuid4(),
            "exchange": "commands",
            "routing_key": "charge.card",
            "bundle": 1,
            "body": each.encode(),
            "attempts": 0,
            "due_at": NOW,
        }
        for each in events
    ]
    with database.begin() as connection:
        connection.execute(outbox.insert(), rows)


def record(database: Engine, *events: Envelope) -> None:
    """Write events to the inbox."""
    rows = [{"message_key": each.key, "consumer": "c", "handled_at": NOW} for each in events]
    with database.begin() as connection:
        connection.execute(inbox.insert(), rows)


def test_what_is_confirmed_while_it_is_in_the_outbox_is_as_it_should_be(database: Engine, tap: Tap, see: Watch) -> None:
    keep(database, event(1), event(2), event(3))
    see(Way.TO_BROKER, b"AMQP\x00\x00\x09\x01" + published(event(1), event(2)) + published(event(3)))
    see(Way.TO_CLIENT, acknowledged(2, several=True))
    assert tap.found == []
    assert tap.types == {"charge.card": 3}


def test_what_has_left_the_outbox_before_its_confirm_is_found(tap: Tap, see: Watch) -> None:
    see(Way.TO_BROKER, published(event(1)))
    see(Way.TO_CLIENT, acknowledged(1))
    assert tap.found == ["I7: charge.card e1 has left the outbox before it was confirmed"]


def test_a_second_confirm_of_what_was_deleted_after_the_first_is_no_fault(
    database: Engine, tap: Tap, see: Watch
) -> None:
    keep(database, event(1))
    see(Way.TO_BROKER, published(event(1)) + published(event(1)))
    see(Way.TO_CLIENT, acknowledged(1))
    with database.begin() as connection:
        connection.execute(outbox.delete())
    see(Way.TO_CLIENT, acknowledged(2))
    assert tap.found == []


def test_what_is_returned_is_not_confirmed(database: Engine, tap: Tap, see: Watch) -> None:
    keep(database, event(1))
    see(Way.TO_BROKER, published(event(1)))
    see(Way.TO_CLIENT, returned(event(1)) + acknowledged(1))
    assert tap.confirmed == {}


def test_what_is_refused_is_not_confirmed(database: Engine, tap: Tap, see: Watch) -> None:
    keep(database, event(1))
    see(Way.TO_BROKER, published(event(1)))
    see(Way.TO_CLIENT, frame.marshal(commands.Basic.Nack(delivery_tag=1), 1))
    assert tap.confirmed == {}


def test_what_is_acknowledged_after_its_commit_is_as_it_should_be(database: Engine, tap: Tap, see: Watch) -> None:
    see(Way.TO_CLIENT, delivered(1, event(1), event(2)))
    record(database, event(1), event(2))
    see(Way.TO_BROKER, acknowledged(1))
    assert tap.found == []
    assert tap.acknowledged.keys() == {"e1", "e2"}


def test_what_is_acknowledged_before_its_commit_is_found(database: Engine, tap: Tap, see: Watch) -> None:
    see(Way.TO_CLIENT, delivered(1, event(1), event(2)) + delivered(2, event(3)))
    record(database, event(1))
    see(Way.TO_BROKER, acknowledged(1))
    assert tap.found == ["I6: charge.card e2 is acknowledged, and nothing of it is committed"]
    see(Way.TO_BROKER, frame.marshal(commands.Basic.Reject(delivery_tag=2), 1))
    assert len(tap.found) == 1, "who gives a message back need not have committed anything"


def test_frames_are_put_together_however_they_come(tap: Tap, see: Watch) -> None:
    for byte in published(event(1)):
        see(Way.TO_BROKER, bytes([byte]))
    for byte in acknowledged(1):
        see(Way.TO_CLIENT, bytes([byte]))
    assert tap.confirmed == {"e1": "charge.card"}


def test_a_tap_that_fails_says_so(tap: Tap, see: Watch) -> None:
    see(Way.TO_CLIENT, b"\x09\x00\x01\x00\x00\x00\x01 no end")
    assert [found.partition(":")[0] for found in tap.found] == ["the tap has failed"]
