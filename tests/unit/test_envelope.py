"""What travels beside a message's data."""

import json
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

from events.envelope import Direction, Envelope, Result, SagaLink, wrap
from events.message import Command

SAGA = UUID("01900000-0000-7000-8000-00000000abcd")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class ChargeCard(Command, version=4):
    order: str


def test_a_message_is_wrapped_under_its_type_and_version() -> None:
    envelope = wrap(ChargeCard(order="7"), id="1", source="/shop", time=NOW, correlation_id="basket")
    assert (envelope.type, envelope.version, envelope.data) == ("charge.card", 4, b'{"order":"7"}')
    assert (envelope.id, envelope.source, envelope.time, envelope.correlation_id) == ("1", "/shop", NOW, "basket")


def test_an_envelope_is_one_cloudevent() -> None:
    link = SagaLink(SAGA, "charge", Direction.UNDO, 2, Result.FAILED)
    envelope = wrap(ChargeCard(order="é"), id="1", source="/s", time=NOW, saga=link, reply_to="coordinator")
    assert json.loads(envelope.encode()) == {
        "specversion": "1.0",
        "id": "1",
        "source": "/s",
        "type": "charge.card",
        "dataschema": "urn:schema:charge.card:4",
        "datacontenttype": "application/json",
        "time": "2026-01-02T03:04:05Z",
        "sagaid": str(SAGA),
        "sagastep": "charge",
        "sagadirection": "undo",
        "sagaattempt": 2,
        "sagaresult": "failed",
        "replyto": "coordinator",
        "data": {"order": "é"},
    }


def test_what_is_not_there_is_not_written() -> None:
    envelope = Envelope(id="1", source="/s", type="t", version=1, data=b"{}", tracestate="")
    assert set(json.loads(envelope.encode())) == {
        "specversion",
        "id",
        "source",
        "type",
        "dataschema",
        "datacontenttype",
        "data",
    }


def test_names_with_quotes_are_escaped() -> None:
    envelope = Envelope(id='"1"\n\\', source="/s", type="t", version=1, data=b"{}", subject='","data":{}')
    document = json.loads(envelope.encode())
    assert document["id"] == '"1"\n\\'
    assert document["subject"] == '","data":{}'


def test_the_time_keeps_its_zone() -> None:
    time = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone(timedelta(hours=-2)))
    envelope = Envelope(id="1", source="/s", type="t", version=1, data=b"{}", time=time)
    assert datetime.fromisoformat(json.loads(envelope.encode())["time"]) == time


def test_an_id_that_is_a_uuid_is_the_key_wherever_it_comes_from() -> None:
    one = Envelope(id=str(SAGA), source="/a", type="t", version=1, data=b"{}")
    other = Envelope(id=str(SAGA), source="/b", type="t", version=1, data=b"{}")
    assert one.key == other.key == SAGA


def test_another_id_is_unique_with_its_source_only() -> None:
    """CloudEvents 1.0.2, section 3.1.1."""
    keys = {
        Envelope(id=name, source=source, type="t", version=1, data=b"{}").key
        for name in ("1", "2", str(SAGA).upper(), f"{{{SAGA}}}")
        for source in ("/a", "/b")
    }
    assert len(keys) == 8


def test_the_key_is_stable() -> None:
    envelope = Envelope(id="1", source="/a", type="t", version=1, data=b"{}")
    assert envelope.key == envelope.key == UUID("ec297852-fec2-8b5b-b3ae-1ddc24ceabad")
    assert Envelope(id="1", source="/a", type="other", version=2, data=b"[]").key == envelope.key


def test_the_key_is_no_part_of_the_value() -> None:
    one = Envelope(id="1", source="/a", type="t", version=1, data=b"{}")
    other = Envelope(id="1", source="/a", type="t", version=1, data=b"{}")
    assert one.key == one._key
    assert other._key is None
    assert one == other
