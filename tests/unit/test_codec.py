"""From bytes to envelopes. The `cloudevents` package is the oracle for what is a CloudEvent."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from cloudevents.core.bindings import amqp, rabbitmq
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st

from events.codec import (
    BATCH_TYPE,
    STRUCTURED_TYPE,
    Limits,
    Part,
    Readable,
    Unreadable,
    bundle_body,
    read_body,
)
from events.envelope import Direction, Envelope, Result, SagaLink

TRACE = f"00-{'a' * 32}-{'b' * 16}-01"
MINIMAL = b'{"specversion":"1.0","id":"1","source":"/s","type":"order.placed","data":{"order":"7"}}'
SAGA = UUID("01900000-0000-7000-8000-000000000001")


def read(
    body: bytes,
    *,
    content_type: str | None = BATCH_TYPE,
    headers: Mapping[str, Any] | None = None,
    encoding: str | None = None,
    limits: Limits | None = None,
) -> list[Part]:
    return read_body(
        body, content_type=content_type, headers=headers or {}, encoding=encoding, limits=limits or Limits()
    )


def envelope_of(part: Part) -> Envelope:
    assert isinstance(part, Readable), part
    return part.envelope


def refused(parts: list[Part], raw: bytes) -> str:
    """Check that the whole body came back as it is; return the reason."""
    [part] = parts
    assert isinstance(part, Unreadable)
    assert part.raw == raw
    assert str(part.error)
    return f"{part.error.code}: {part.error}"


def event(**attributes: Any) -> bytes:
    return json.dumps({"specversion": "1.0", "id": "1", "source": "/s", "type": "t", **attributes}).encode()


full = Envelope(
    id="order-1",
    source="/shop",
    type="charge.card",
    version=3,
    data=b'{"order":"7","lines":[1,2.5,null,true,"\xc3\xa9"]}',
    time=datetime(2026, 1, 2, 3, 4, 5, 678901, UTC),
    subject="order/7",
    correlation_id="basket",
    causation_id="click",
    traceparent=TRACE,
    tracestate="vendor=1",
    saga=SagaLink(SAGA, "charge", Direction.UNDO, 2, Result.DECLINED, SAGA, "charge.card"),
    reply_to="coordinator",
)


# The three forms


@pytest.mark.parametrize("content_type", [BATCH_TYPE, "application/json", None, "", f"{BATCH_TYPE}; charset=UTF-8"])
def test_a_batch_is_read(content_type: str | None) -> None:
    other = MINIMAL.replace(b'"id":"1"', b'"id":"2"')
    parts = read(b" [" + MINIMAL + b" ,\n" + other + b"]\r\n", content_type=content_type)
    assert [envelope_of(part).id for part in parts] == ["1", "2"]
    assert [part.raw for part in parts] == [MINIMAL, other]


@pytest.mark.parametrize("content_type", [STRUCTURED_TYPE, "application/json", None, "APPLICATION/CloudEvents+JSON"])
def test_a_single_structured_event_is_read(content_type: str | None) -> None:
    [part] = read(MINIMAL, content_type=content_type)
    found = envelope_of(part)
    assert (found.id, found.source, found.type, found.version) == ("1", "/s", "order.placed", 1)
    assert found.data == b'{"order":"7"}'
    assert part.raw == MINIMAL


@pytest.mark.parametrize("prefix", ["cloudEvents:", "cloudEvents_", "ce-"])
@pytest.mark.parametrize("content_type", ["application/json", "application/vnd.shop+json; charset=utf-8", None])
def test_binary_mode_is_read(prefix: str, content_type: str | None) -> None:
    attributes = {"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "dataschema": "urn:schema:t:2"}
    headers = {prefix + name: value for name, value in attributes.items()} | {"x-other": 1}
    [part] = read(b'{"order":"7"}', content_type=content_type, headers=headers)
    found = envelope_of(part)
    assert (found.id, found.source, found.type, found.version) == ("1", "/s", "t", 2)
    assert found.data == b'{"order":"7"}'
    assert part.raw == b'{"order":"7"}'


def test_binary_mode_carries_everything_in_headers_of_the_types_amqp_has() -> None:
    headers: dict[str, Any] = {
        "cloudEvents:specversion": b"1.0",
        "cloudEvents:id": "1",
        "cloudEvents:source": "/s",
        "cloudEvents:type": "t",
        "cloudEvents:time": datetime(2026, 1, 1, tzinfo=UTC),
        "cloudEvents:sagaid": str(SAGA),
        "cloudEvents:sagastep": "charge",
        "cloudEvents:sagadirection": "do",
        "cloudEvents:sagaattempt": 2,
        "cloudEvents:replyto": "coordinator",
    }
    found = envelope_of(read(b"", content_type=None, headers=headers)[0])
    assert found.time == datetime(2026, 1, 1, tzinfo=UTC)
    assert found.saga == SagaLink(SAGA, "charge", Direction.DO, 2)
    assert found.reply_to == "coordinator"
    assert found.data == b"{}"


def test_an_event_without_data_has_an_empty_object() -> None:
    for body in (event(), event(data=None)):
        assert envelope_of(read(body)[0]).data == b"{}"


# The oracle


def oracle_event() -> CloudEvent:
    return CloudEvent(
        {
            "id": "order-1",
            "source": "/shop",
            "type": "order.placed",
            "time": datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2))),
            "subject": "order/7",
            "dataschema": "https://example.com/schemas/order.placed/2",
            "datacontenttype": "application/json",
            "correlationid": "basket",
            "traceparent": TRACE,
        },
        {"order": "é\n\U0001f600", "lines": [1, 2.5, None, True]},
    )


def check_oracle_event(found: Envelope) -> None:
    assert (found.id, found.source, found.type, found.version) == ("order-1", "/shop", "order.placed", 2)
    assert found.time == datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC)
    assert (found.subject, found.correlation_id, found.traceparent) == ("order/7", "basket", TRACE)
    assert json.loads(found.data) == {"order": "é\n\U0001f600", "lines": [1, 2.5, None, True]}


def test_what_the_oracle_writes_structured_is_read_alone_and_in_a_batch() -> None:
    message = rabbitmq.to_structured_event(oracle_event())
    for body in (message.body, b"[" + message.body + b"]"):
        [part] = read(body, content_type=message.content_type if body is message.body else BATCH_TYPE)
        check_oracle_event(envelope_of(part))


def test_what_the_oracle_writes_in_rabbitmqs_binary_mode_is_read() -> None:
    message = rabbitmq.to_binary_event(oracle_event())
    [part] = read(message.body, content_type=message.content_type, headers=message.headers)
    check_oracle_event(envelope_of(part))


def test_what_the_oracle_writes_in_amqps_binary_mode_is_read() -> None:
    message = amqp.to_binary_event(oracle_event())
    headers = dict(message.application_properties)
    headers["cloudEvents_time"] = oracle_event().get_time()  # the oracle's number stands for AMQP's timestamp
    [part] = read(message.application_data, content_type=message.properties["content-type"], headers=headers)
    check_oracle_event(envelope_of(part))


def test_what_we_write_is_read_by_the_oracle() -> None:
    found = rabbitmq.from_structured_event(
        rabbitmq.RabbitMQMessage(headers={}, content_type=STRUCTURED_TYPE, body=full.encode())
    )
    assert found.get_id() == "order-1"
    assert found.get_source() == "/shop"
    assert found.get_type() == "charge.card"
    assert found.get_dataschema() == "urn:schema:charge.card:3"
    assert found.get_datacontenttype() == "application/json"
    assert found.get_time() == full.time
    assert found.get_subject() == "order/7"
    assert found.get_data() == json.loads(full.data)
    assert {
        name: found.get_extension(name) for name in ("correlationid", "causationid", "traceparent", "tracestate")
    } == {
        "correlationid": "basket",
        "causationid": "click",
        "traceparent": TRACE,
        "tracestate": "vendor=1",
    }
    assert found.get_extension("sagaid") == str(SAGA)
    assert found.get_extension("sagaattempt") == 2


def test_a_bundle_is_a_json_array_of_what_the_oracle_reads() -> None:
    body = bundle_body([full.encode(), MINIMAL])
    for document in json.loads(body):
        JSONFormat().read(None, json.dumps(document))


# Round trips

_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=50)
_optional_texts = st.none() | _texts
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(_texts, children, max_size=4),
    max_leaves=15,
)
_links = st.builds(
    SagaLink,
    st.uuids(),
    _texts,
    st.sampled_from(Direction),
    st.integers(1, 1000),
    st.none() | st.sampled_from(Result),
)
_envelopes = st.builds(
    Envelope,
    id=_texts,
    source=_texts,
    type=_texts.filter(lambda text: len(text) < 40),
    version=st.integers(1, 2**31 - 1),
    data=st.dictionaries(_texts, _json, max_size=4).map(lambda value: json.dumps(value).encode()),
    time=st.none() | st.datetimes(timezones=st.just(UTC)),
    subject=_optional_texts,
    correlation_id=_optional_texts,
    causation_id=_optional_texts,
    traceparent=st.none() | st.just(TRACE),
    tracestate=_optional_texts,
    saga=st.none() | _links,
    reply_to=_optional_texts,
)


@given(st.lists(_envelopes, min_size=1, max_size=5))
def test_what_is_written_is_read_as_it_was(sent: list[Envelope]) -> None:
    encoded = [each.encode() for each in sent]
    parts = read(bundle_body(encoded))
    assert [part.raw for part in parts] == encoded
    for part, original in zip(parts, sent, strict=True):
        found = envelope_of(part)
        assert json.loads(found.data) == json.loads(original.data)
        found.data = original.data  # written by other hands, with other spaces
        assert found == original
        assert found.key == original.key


def test_reading_twice_changes_nothing() -> None:
    once = envelope_of(read(full.encode())[0])
    assert once == full
    assert envelope_of(read(once.encode())[0]).encode() == once.encode() == full.encode()


# Malformed bodies

_DEEP = 100_000

MALFORMED = {
    "empty": b"",
    "blank": b" \n\t",
    "truncated array": b"[" + MINIMAL,
    "truncated object": b"[" + MINIMAL[:-1],
    "truncated string": b'[{"specversion":"1.0","id":"1',
    "truncated escape": b'["\\u00',
    "no JSON": b"hello",
    "XML": b"<event/>",
    "pickle": b"\x80\x04\x95\x00.",
    "NUL": b"\0",
    "raw NUL in a string": MINIMAL.replace(b"7", b"\0"),
    "escaped NUL in data": MINIMAL.replace(b"7", b"\\u0000"),
    "escaped NUL in a name": MINIMAL.replace(b"order", b"\\u0000"),
    "escaped NUL after an escaped backslash": MINIMAL.replace(b"7", b"\\\\\\u0000"),
    "NaN": MINIMAL.replace(b'"7"', b"NaN"),
    "Infinity": MINIMAL.replace(b'"7"', b"Infinity"),
    "-Infinity": MINIMAL.replace(b'"7"', b"-Infinity"),
    "1e999": MINIMAL.replace(b'"7"', b"1e999"),
    "-1e999": MINIMAL.replace(b'"7"', b"-1e999"),
    "duplicate attribute": MINIMAL.replace(b"{", b'{"id":"0",', 1),
    "duplicate name in data": MINIMAL.replace(b'"order":"7"', b'"a":1,"a":1'),
    "duplicate name deep in data": MINIMAL.replace(b'"7"', b'[[{"b":{"a":1,"a":2}}]]'),
    "duplicate name by escapes": MINIMAL.replace(b'"order":"7"', b'"a":1,"\\u0061":1'),
    "high surrogate": MINIMAL.replace(b"7", b"\\ud800"),
    "low surrogate": MINIMAL.replace(b"7", b"\\uDC00"),
    "surrogates in the wrong order": MINIMAL.replace(b"7", b"\\udc00\\ud800"),
    "surrogate in UTF-8": MINIMAL.replace(b"7", b"\xed\xa0\x80"),
    "Latin-1": MINIMAL.replace(b"7", b"\xe9"),
    "UTF-16": MINIMAL.decode().encode("utf-16"),
    "overlong UTF-8": MINIMAL.replace(b"7", b"\xc0\x80"),
    "byte order mark": b"\xef\xbb\xbf" + MINIMAL,
    "deep arrays": b"[" * _DEEP,
    "deep arrays, closed": b"[" * _DEEP + b"]" * _DEEP,
    "deep objects": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "huge integer": MINIMAL.replace(b'"7"', b"9" * 5000),
    "hexadecimal": MINIMAL.replace(b'"7"', b"0x10"),
    "leading zero": MINIMAL.replace(b'"7"', b"007"),
    "single quotes": b"{'specversion':'1.0'}",
    "comment": b"/* */" + MINIMAL,
    "trailing comma": b"[" + MINIMAL + b",]",
    "leading comma": b"[," + MINIMAL + b"]",
    "no comma": b"[" + MINIMAL + b" " + MINIMAL + b"]",
    "two documents": MINIMAL + MINIMAL,
    "text after the batch": b"[" + MINIMAL + b"] x",
    "raw line break in a string": MINIMAL.replace(b"7", b"\n"),
    "exotic space": b"\xc2\xa0" + MINIMAL,
    "empty batch": b"[]",
    "blank batch": b"[ \n ]",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_body_comes_back_whole_with_a_reason(name: str) -> None:
    body = MALFORMED[name]
    assert refused(read(body), body).startswith("malformed: ")


NO_EVENT = {
    "a number": b"17",
    "a string": b'"event"',
    "null": b"null",
    "array in array": b"[]",
    "an event in an array": b"[" + MINIMAL + b"]",
    "no attributes": b"{}",
    "another version of CloudEvents": MINIMAL.replace(b'"1.0"', b'"0.3"'),
    "no version": MINIMAL.replace(b"specversion", b"version"),
    "version as a number": MINIMAL.replace(b'"1.0"', b"1.0"),
    "no id": MINIMAL.replace(b'"id"', b'"ID"'),
    "empty id": MINIMAL.replace(b'"id":"1"', b'"id":""'),
    "id as a number": MINIMAL.replace(b'"id":"1"', b'"id":1'),
    "no source": MINIMAL.replace(b"source", b"origin"),
    "no type": MINIMAL.replace(b'"type"', b'"kind"'),
    "type as a list": MINIMAL.replace(b'"order.placed"', b"[]"),
    "endless id": MINIMAL.replace(b'"id":"1"', b'"id":"' + b"1" * 1025 + b'"'),
    "data is a list": MINIMAL.replace(b'{"order":"7"}', b"[1]"),
    "data is a string": MINIMAL.replace(b'{"order":"7"}', b'"e30="'),
    "data is a number": MINIMAL.replace(b'{"order":"7"}', b"7"),
    "binary data": event(data_base64="e30="),
    "data of another type": event(datacontenttype="text/xml"),
    "data of no type": event(datacontenttype=7),
    "a time that is none": event(time="yesterday"),
    "a time as a number": event(time=1),
    "version 0": event(dataschema="urn:schema:t:0"),
    "a version beyond all": event(dataschema="urn:schema:t:9999999999"),
    "subject as an object": event(subject={}),
    "a saga that is no UUID": event(sagaid="7", sagastep="s", sagadirection="do", sagaattempt=1),
    "a saga without a step": event(sagaid=str(SAGA), sagadirection="do", sagaattempt=1),
    "a saga in no direction": event(sagaid=str(SAGA), sagastep="s", sagadirection="up", sagaattempt=1),
    "a saga without an attempt": event(sagaid=str(SAGA), sagastep="s", sagadirection="do"),
    "a saga with an attempt in words": event(sagaid=str(SAGA), sagastep="s", sagadirection="do", sagaattempt="one"),
    "a saga with a list of attempts": event(sagaid=str(SAGA), sagastep="s", sagadirection="do", sagaattempt=[1]),
    "a saga with no such result": event(
        sagaid=str(SAGA), sagastep="s", sagadirection="do", sagaattempt=1, sagaresult="maybe"
    ),
    "data nested too deeply to pass on": MINIMAL.replace(b'"7"', b"[" * 400 + b"]" * 400),
}


@pytest.mark.parametrize("name", NO_EVENT)
def test_one_bad_element_leaves_the_others_of_its_batch_readable(name: str) -> None:
    bad = NO_EVENT[name]
    first, last = MINIMAL, MINIMAL.replace(b'"id":"1"', b'"id" : "2"')
    parts = read(b"[" + first + b"," + bad + b" , " + last + b"]")
    assert [part.raw for part in parts] == [first, bad, last]
    assert envelope_of(parts[0]).id == "1"
    assert envelope_of(parts[2]).id == "2"
    assert isinstance(parts[1], Unreadable)
    assert parts[1].error.code == "malformed"
    assert str(parts[1].error)


NO_JSON = {
    "duplicate name": MINIMAL.replace(b'"order":"7"', b'"a":1,"a":1'),
    "NaN": MINIMAL.replace(b'"7"', b"NaN"),
    "out of range": MINIMAL.replace(b'"7"', b"1e999"),
    "NUL": MINIMAL.replace(b"7", b"\\u0000"),
    "lone surrogate": MINIMAL.replace(b"7", b"\\ud800"),
}


@pytest.mark.parametrize("name", NO_JSON)
def test_one_element_that_is_refused_as_json_leaves_the_others_of_its_batch_readable(name: str) -> None:
    bad = NO_JSON[name]
    parts = read(b"[" + MINIMAL + b", " + bad + b" ," + MINIMAL + b"]")
    assert [part.raw for part in parts] == [MINIMAL, bad, MINIMAL]
    assert [isinstance(part, Readable) for part in parts] == [True, False, True]


@pytest.mark.parametrize("name", [name for name in NO_EVENT if "array" not in name])
def test_a_single_event_that_is_none_comes_back_whole_with_a_reason(name: str) -> None:
    body = b" " + NO_EVENT[name] + b"\n"
    assert refused(read(body, content_type=STRUCTURED_TYPE), body).startswith("malformed: ")


def test_an_array_is_no_structured_event() -> None:
    body = b"[" + MINIMAL + b"]"
    assert "must be a JSON object" in refused(read(body, content_type=STRUCTURED_TYPE), body)


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/octet-stream", "application/xml", "application/cloudevents-batch+avro"]
)
def test_another_content_type_is_refused(content_type: str) -> None:
    assert "content type" in refused(read(MINIMAL, content_type=content_type), MINIMAL)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "utf-16", "x"])
def test_another_content_encoding_is_refused(encoding: str) -> None:
    assert "content encoding" in refused(read(MINIMAL, encoding=encoding), MINIMAL)


@pytest.mark.parametrize("encoding", ["utf-8", "UTF-8", "utf8", "identity", "", None])
def test_a_content_encoding_that_changes_nothing_is_fine(encoding: str | None) -> None:
    assert envelope_of(read(MINIMAL, encoding=encoding)[0]).id == "1"


@pytest.mark.parametrize(
    ("body", "content_type", "more"),
    [
        (b"<order/>", "text/xml", {}),
        (b"<order/>", None, {}),
        (b"[1]", "application/json", {}),
        (b'{"a":1,"a":2}', "application/json", {}),
        (b'{"a":"\\u0000"}', "application/json", {}),
        (b'{"a":NaN}', "application/json", {}),
        (b"\xff", "application/json", {}),
        (b"{} x", "application/json", {}),
        (b"[" * _DEEP, "application/json", {}),
        (b"{}", "application/json", {"ce-id": None}),
        (b"{}", "application/json", {"ce-id": b"\xff\0"}),
        (b"{}", "application/json", {"ce-id": 7}),
        (b"{}", "application/json", {"ce-subject": ["a"]}),
        (b"{}", "application/json", {"ce-time": "now"}),
        (b"{}", "application/json", {"ce-sagaid": str(SAGA)}),
        (
            b"{}",
            "application/json",
            {"ce-sagaid": str(SAGA), "ce-sagastep": "s", "ce-sagadirection": "do", "ce-sagaattempt": float("inf")},
        ),
    ],
)
def test_bad_binary_mode_comes_back_whole_with_a_reason(
    body: bytes, content_type: str | None, more: dict[str, Any]
) -> None:
    headers = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/s", "ce-type": "t", **more}
    assert refused(read(body, content_type=content_type, headers=headers), body).startswith("malformed: ")


def test_escapes_that_only_look_bad_are_fine() -> None:
    for text in ("\\\\u0000", "\\\\ud800", "\\ud83d\\ude00", "\\\\\\\\ud800"):
        body = MINIMAL.replace(b"7", text.encode())
        assert json.loads(envelope_of(read(body)[0]).data) == {"order": json.loads(f'"{text}"')}


def test_unknown_attributes_are_ignored() -> None:
    assert envelope_of(read(event(color="red", nested={"a": 1}))[0]).id == "1"


@pytest.mark.parametrize(
    "traceparent", ["", "garbage", "00-" + "0" * 10, f"00-{'A' * 32}-{'b' * 16}-01", f"ff-{'a' * 32}-{'b' * 16}-01"]
)
def test_a_broken_trace_context_is_dropped_and_the_event_is_kept(traceparent: str) -> None:
    assert envelope_of(read(event(traceparent=traceparent))[0]).traceparent is None


@pytest.mark.parametrize(
    ("schema", "version"),
    [
        (None, 1),
        ("urn:schema:order.placed:7", 7),
        ("https://example.com/order.placed/v2", 2),
        ("https://example.com/order.placed#3", 3),
        ("https://example.com/order", 1),
        ("https://example.com/v2/order", 1),
        (f"urn:schema:t:{2**31 - 1}", 2**31 - 1),
    ],
)
def test_the_version_is_what_the_schema_ends_in(schema: str | None, version: int) -> None:
    assert envelope_of(read(event(dataschema=schema))[0]).version == version


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-02T03:04:05Z", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02T03:04:05.123456789Z", datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=UTC)),
        ("2026-01-02T03:04:05-02:00", datetime(2026, 1, 2, 5, 4, 5, tzinfo=UTC)),
    ],
)
def test_times_of_other_languages_are_read(text: str, expected: datetime) -> None:
    assert envelope_of(read(event(time=text))[0]).time == expected


# Sizes


def test_the_body_may_be_as_large_as_the_limit_and_not_a_byte_larger() -> None:
    body = MINIMAL.replace(b"7", b"x" * (1000 - len(MINIMAL) + 1))
    assert len(body) == 1000
    limits = Limits(body=1000)
    assert envelope_of(read(body, limits=limits)[0]).id == "1"
    larger = body + b" "
    assert refused(read(larger, limits=limits), larger).startswith("too_large: the body has 1001 bytes")


def test_the_default_limit_is_256_kib() -> None:
    body = MINIMAL + b" " * (256 * 1024 - len(MINIMAL))
    assert envelope_of(read(body)[0]).id == "1"
    assert refused(read(body + b" "), body + b" ").startswith("too_large: ")


def test_the_headers_may_be_as_large_as_the_limit_and_not_a_byte_larger() -> None:
    assert envelope_of(read(MINIMAL, headers={"name": "x" * (16 * 1024 - 4)})[0]).id == "1"
    reason = refused(read(MINIMAL, headers={"name": "x" * (16 * 1024 - 3)}), MINIMAL)
    assert reason.startswith("too_large: the headers have 16385 bytes")


# A bomb is as large as a body may be. Quadratic work on one takes minutes; no time is asserted.

_SIZE = Limits().body
BOMBS = {
    "escaped quotes": b'["' + b'\\"' * (_SIZE // 2 - 10) + b"\\ud",
    "quotes": b'["' + b'"' * (_SIZE - 20) + b"\\ud",
    "strings": b'["' + b'","' * (_SIZE // 3 - 20) + b'\\ud800"]',
    "backslashes": b'["' + b"\\" * (_SIZE - 20) + b"\\ud",
    "duplicate after many": b"[{" + b"".join(b'"%05x":0,' % n for n in range(23_000)) + b'"059d7":0}]',
    "spaces": b"[" + b" " * (_SIZE - 10) + b"x",
    "numbers": b"[" + b"1," * (_SIZE // 2 - 10) + b"x",
    "digits": b"[0." + b"1" * (_SIZE - 10),
    "objects": b"[" + b"{}," * (_SIZE // 3 - 10) + b"x",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_one_go(name: str) -> None:
    body = BOMBS[name]
    assert len(body) <= _SIZE
    [part] = read(body)
    assert isinstance(part, Unreadable)
    assert part.raw in (body, body[1:-1])  # the only element of a batch comes back without the brackets


# Fuzz

_headers = st.dictionaries(
    st.sampled_from(["ce-id", "ce-type", "cloudEvents:source", "ce-specversion", "ce-time", "ce-sagaattempt", "x"])
    | st.text(max_size=5),
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.datetimes()
    | st.just("1.0")
    | st.lists(st.integers(), max_size=2),
    max_size=6,
)
_content_types = st.sampled_from([None, "", BATCH_TYPE, STRUCTURED_TYPE, "application/json", "text/plain"]) | st.text()
_encodings = st.sampled_from([None, "utf-8", "gzip"]) | st.text(max_size=5)


def check_never_raises(body: bytes, content_type: str | None, headers: dict[str, Any], encoding: str | None) -> None:
    parts = read(body, content_type=content_type, headers=headers, encoding=encoding, limits=Limits(2000, 200))
    assert parts
    for part in parts:
        assert part.raw in body
        if isinstance(part, Unreadable):
            assert part.error.code in {"malformed", "too_large"}
        else:
            again = read(part.envelope.encode(), content_type=STRUCTURED_TYPE)
            assert envelope_of(again[0]) == part.envelope


@given(st.binary(max_size=300), _content_types, _headers, _encodings)
def test_arbitrary_bytes_never_raise(
    body: bytes, content_type: str | None, headers: dict[str, Any], encoding: str | None
) -> None:
    check_never_raises(body, content_type, headers, encoding)


@given(_json, _content_types, _headers)
def test_arbitrary_json_never_raises(document: Any, content_type: str | None, headers: dict[str, Any]) -> None:
    check_never_raises(json.dumps(document).encode(), content_type, headers, None)


@given(
    st.lists(_envelopes, min_size=1, max_size=3),
    st.lists(
        st.tuples(
            st.integers(0, 10_000),
            st.integers(0, 5),
            st.sampled_from(
                [
                    b"",
                    b'"',
                    b"\\",
                    b"{",
                    b"}",
                    b"[",
                    b"]",
                    b",",
                    b"\0",
                    b"\xff",
                    b"NaN",
                    b"1e999",
                    b"\\u0000",
                    b"\\ud800",
                ]
            ),
        ),
        max_size=4,
    ),
    _content_types,
)
def test_damaged_bodies_never_raise(
    sent: list[Envelope], damages: list[tuple[int, int, bytes]], content_type: str | None
) -> None:
    body = bundle_body([each.encode() for each in sent])
    for at, length, put in damages:
        start = at % (len(body) + 1)
        body = body[:start] + put + body[start + length :]
    check_never_raises(body, content_type, {}, None)
