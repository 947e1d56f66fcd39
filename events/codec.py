"""From bytes to envelopes: strict, limited in size, and never losing what cannot be read.

Accepted are the three CloudEvents content modes of the AMQP and JSON bindings: a JSON batch (the form we
send), a single structured event, and binary mode, in which the attributes are AMQP headers.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn
from uuid import UUID

from pydantic_core import to_json

from events.envelope import Direction, Envelope, Result, SagaLink
from events.errors import MalformedError, RejectedError, TooLargeError

BATCH_TYPE = "application/cloudevents-batch+json"
STRUCTURED_TYPE = "application/cloudevents+json"
_JSON_TYPE = re.compile(r"application/(json|[\w.+-]+\+json)", re.ASCII | re.IGNORECASE)
_BINARY_PREFIXES = ("cloudEvents:", "cloudEvents_", "ce-")
_MAX_ATTRIBUTE = 1024
_MAX_PARTS = 1000  # each part that cannot be read becomes a dead letter: one message must not make thousands
_MAX_VERSION = 2**31 - 1
_trailing_version = re.compile(r"[:/#.]v?(\d{1,10})$")
_traceparent = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
_string = re.compile(r'"(?:[^"\\]++|\\.)*+"?+', re.DOTALL)  # the end of the text ends it, too: linear in any case
_attribute = re.compile(r"[a-z0-9]+", re.ASCII)
_whitespace = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes that are checked before anything is parsed."""

    body: int = 256 * 1024
    headers: int = 16 * 1024


@dataclass(slots=True)
class Unreadable:
    """A part of a body that is no CloudEvent: its exact bytes and why."""

    raw: bytes
    error: RejectedError


@dataclass(slots=True)
class Readable:
    """A CloudEvent and the exact bytes that it was read from."""

    raw: bytes
    envelope: Envelope


Part = Readable | Unreadable


def bundle_body(encoded: list[bytes]) -> bytes:
    """Return the body of a JSON batch made of encoded envelopes."""
    return b"[%b]" % b",".join(encoded)


def read_body(
    body: bytes, *, content_type: str | None, headers: Mapping[str, Any], encoding: str | None, limits: Limits
) -> list[Part]:
    """Take an AMQP body apart. Whatever cannot be read comes back as `Unreadable`; nothing is raised."""
    try:
        _check_sizes(body, headers, encoding, limits)
        media_type = (content_type or "").partition(";")[0].strip().lower()
        if (attributes := _attributes_of_binary_mode(content_type, headers)) is not None:
            return [_read_binary(body, attributes, media_type)]
        if media_type not in ("", "application/json", BATCH_TYPE, STRUCTURED_TYPE):
            raise MalformedError(f"content type {media_type!r} is no CloudEvents JSON")
        text = _text(body)
        start = _skip(text, 0)
        if text.startswith("[", start) and media_type != STRUCTURED_TYPE:
            return _read_batch(text, start)
        document, end = _parse(text, start)
        _expect_end(text, end)
        _refuse_bad_escapes(text)
        return [_read_part(document, body)]
    except RejectedError as error:
        return [Unreadable(body, error)]


def attributes_of(part: Readable, *, content_type: str | None, headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a message as they stand in a structured event, in whatever mode it came.

    What we have no use for is among them: an edited message keeps the extensions of whoever sent it.
    """
    binary = _attributes_of_binary_mode(content_type, headers)
    if binary is None:
        document: dict[str, Any] = json.loads(part.raw)
        document.pop("data", None)
        return document
    found = {name: value for name, value in binary.items() if _attribute.fullmatch(name) and value is not None}
    found.pop("data", None)
    if part.envelope.time is not None:  # as an AMQP timestamp it has another form
        found["time"] = part.envelope.time.isoformat()
    return {**found, "datacontenttype": "application/json"}


def _attributes_of_binary_mode(content_type: str | None, headers: Mapping[str, Any]) -> dict[str, Any] | None:
    if (content_type or "").strip().lower().startswith("application/cloudevents"):
        return None
    return _binary_attributes(headers) or None


def _check_sizes(body: bytes, headers: Mapping[str, Any], encoding: str | None, limits: Limits) -> None:
    if len(body) > limits.body:
        raise TooLargeError(f"the body has {len(body)} bytes, the limit is {limits.body}")
    if encoding and encoding.lower() not in ("utf-8", "utf8", "identity"):
        raise MalformedError(f"content encoding {encoding!r} is not accepted; send plain JSON")
    if headers:
        size = sum(len(str(name)) + len(str(value)) for name, value in headers.items())
        if size > limits.headers:
            raise TooLargeError(f"the headers have {size} bytes, the limit is {limits.headers}")


def _text(body: bytes) -> str:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise MalformedError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    return text


def _refuse_bad_escapes(text: str) -> None:
    """Refuse NUL (PostgreSQL cannot store it) and lone surrogates (UTF-8 cannot encode them)."""
    if "\\u0000" not in text and "\\ud" not in text and "\\uD" not in text:
        return
    for value in _string.findall(text):
        try:
            plain = json.loads(value)
            plain.encode()
        except ValueError as error:
            raise MalformedError(f"a string cannot be encoded: {error}") from error
        if "\0" in plain:
            raise MalformedError("a string contains NUL")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        twice = Counter(names).most_common(1)[0][0]
        raise MalformedError(f"the name {twice[:100]!r} stands twice in one object")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if number - number != 0:  # infinity
        raise MalformedError(f"the number {digits[:40]} is out of range")
    return number


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)
_scan: Callable[[str, int], tuple[Any, int]] = _decoder.scan_once  # type: ignore[attr-defined]  # what raw_decode itself calls


_scan_leniently: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().scan_once  # type: ignore[attr-defined]  # ditto


def _parse(text: str, position: int) -> tuple[Any, int]:
    try:
        return _scan(text, position)
    except StopIteration as error:
        raise MalformedError(f"the body is not JSON at character {error.value}") from error
    except json.JSONDecodeError as error:
        raise MalformedError(f"the body is not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise MalformedError("the body is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise MalformedError(f"the body is not JSON: {error}") from error


def _skip(text: str, position: int) -> int:
    match = _whitespace.match(text, position)
    return match.end() if match else position


def _expect_end(text: str, position: int) -> None:
    if _skip(text, position) != len(text):
        raise MalformedError(f"the body goes on after the JSON at character {position}")


def _read_batch(text: str, position: int) -> list[Part]:
    parts: list[Part] = []
    position = _skip(text, position + 1)
    if text.startswith("]", position):
        raise MalformedError("the batch is empty")
    while True:
        part, end = _read_element(text, position)
        parts.append(part)
        if len(parts) > _MAX_PARTS:
            raise MalformedError(f"the batch has more than {_MAX_PARTS} events")
        position = _skip(text, end)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
        elif text.startswith("]", position):
            _expect_end(text, position + 1)
            return parts
        else:
            raise MalformedError(f"the batch is not JSON at character {position}")


def _read_element(text: str, position: int) -> tuple[Part, int]:
    """Read one element of a batch. One that is refused spoils the others only if nobody can tell where it ends."""
    try:
        document, end = _parse(text, position)
        raw = text[position:end]
        _refuse_bad_escapes(raw)
    except MalformedError as error:
        try:
            _, end = _scan_leniently(text, position)
        except (StopIteration, ValueError, RecursionError):
            raise error from None
        return Unreadable(text[position:end].encode(), error), end
    return _read_part(document, raw.encode()), end


def _read_part(document: Any, raw: bytes) -> Part:
    try:
        if not isinstance(document, dict):
            raise MalformedError("an event must be a JSON object")
        if "data_base64" in document:
            raise MalformedError("binary data is not accepted; send JSON in `data`")
        return Readable(raw, _envelope(document, to_json(_object(document.pop("data", None)))))
    except RejectedError as error:
        return Unreadable(raw, error)
    except ValueError as error:  # a lone surrogate that came in unescaped
        return Unreadable(raw, MalformedError(f"the data cannot be encoded: {error}"))


def _object(data: Any) -> dict[str, Any]:
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise MalformedError("`data` must be a JSON object")
    return data


def _binary_attributes(headers: Mapping[str, Any]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for name, value in headers.items():
        for prefix in _BINARY_PREFIXES:
            if name.startswith(prefix):
                attributes[name[len(prefix) :].lower()] = (
                    value.decode(errors="replace") if isinstance(value, bytes) else value
                )
    return attributes


def _read_binary(body: bytes, attributes: dict[str, Any], media_type: str) -> Part:
    try:
        if media_type and not _JSON_TYPE.fullmatch(media_type):
            raise MalformedError(f"content type {media_type!r} is not JSON")
        text = _text(body)
        if text.strip():
            document, end = _parse(text, _skip(text, 0))
            _expect_end(text, end)
            _refuse_bad_escapes(text)
        else:
            document = None
        return Readable(body, _envelope(attributes, to_json(_object(document))))
    except ValueError as error:
        return Unreadable(body, MalformedError(f"the data cannot be encoded: {error}"))
    except RejectedError as error:
        return Unreadable(body, error)


def _envelope(attributes: dict[str, Any], data: bytes) -> Envelope:
    get = attributes.get
    if get("specversion") != "1.0":
        raise MalformedError(f"specversion must be '1.0', not {str(get('specversion'))[:40]!r}")
    content_type = get("datacontenttype")
    if content_type is not None and not _JSON_TYPE.match(str(content_type)):
        raise MalformedError(f"datacontenttype {str(content_type)[:100]!r} is not JSON")
    return Envelope(
        id=_required(attributes, "id"),
        source=_required(attributes, "source"),
        type=_required(attributes, "type"),
        version=_version(_optional(attributes, "dataschema")),
        data=data,
        time=_time(_optional(attributes, "time")),
        subject=_optional(attributes, "subject"),
        correlation_id=_optional(attributes, "correlationid"),
        causation_id=_optional(attributes, "causationid"),
        traceparent=_trace(_optional(attributes, "traceparent")),
        tracestate=_optional(attributes, "tracestate"),
        saga=_saga(attributes) if "sagaid" in attributes else None,
        reply_to=_optional(attributes, "replyto"),
    )


def _required(attributes: dict[str, Any], name: str) -> str:
    value = attributes.get(name)
    if not isinstance(value, str) or not value:
        raise MalformedError(f"the attribute `{name}` must be a non-empty string")
    return _sized(name, value)


def _optional(attributes: dict[str, Any], name: str) -> str | None:
    value = attributes.get(name)
    if value is None:
        return None
    if isinstance(value, datetime):  # an AMQP timestamp in binary mode
        return value.isoformat()
    if not isinstance(value, str):
        raise MalformedError(f"the attribute `{name}` must be a string")
    return _sized(name, value)


def _sized(name: str, value: str) -> str:
    if len(value) > _MAX_ATTRIBUTE or "\0" in value:
        raise MalformedError(f"the attribute `{name}` is longer than {_MAX_ATTRIBUTE} characters or contains NUL")
    return value


def _version(schema: str | None) -> int:
    """Return the version that `dataschema` ends in; a producer that names none speaks version 1."""
    match = _trailing_version.search(schema or "")
    version = int(match[1]) if match else 1
    if not 1 <= version <= _MAX_VERSION:
        raise MalformedError(f"dataschema {schema!r} names no version from 1 on")
    return version


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError as error:
        raise MalformedError(f"the attribute `time` is not RFC 3339: {text[:40]!r}") from error


def _trace(text: str | None) -> str | None:
    """A broken trace context is dropped, not refused: W3C Trace Context 1, section 3.2.2.5."""
    return text if text is not None and _traceparent.fullmatch(text) else None


def _saga(attributes: dict[str, Any]) -> SagaLink:
    try:
        result, undoes = attributes.get("sagaresult"), attributes.get("sagaundoes")
        return SagaLink(
            saga_id=UUID(_required(attributes, "sagaid")),
            step=_required(attributes, "sagastep"),
            direction=Direction(_required(attributes, "sagadirection")),
            attempt=int(attributes["sagaattempt"]),
            result=None if result is None else Result(result),
            undoes=None if undoes is None else UUID(undoes),
            undoes_type=None if undoes is None else _required(attributes, "sagaundoestype"),
        )
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise MalformedError(f"the saga attributes do not fit together: {error}") from error
