"""A message whose AMQP properties cannot be decoded costs itself, not the connection.

pamqp raises on a timestamp after the year 9999, on a routing key that is not UTF-8 and on deeply nested headers;
aiormq then drops the connection. All that was delivered comes back, the offender with it, until after 20 rounds the
innocent messages beside it have become dead letters too. Trace headers that are no text make the instrumentation
raise before our callback is called, so the delivery is never settled. RabbitMQ accepts all this from any publisher.
"""

import base64
import logging
import struct

from opentelemetry import propagate
from pamqp import decode
from pamqp.commands import Basic
from pamqp.header import ContentHeader

UNDECODABLE = "x-undecodable-properties"

_log = logging.getLogger(__name__)
_FIXED_PART = struct.Struct(">HHQ")  # class, weight, body size
_LONGEST_TRACE_HEADER = 8192  # what W3C Baggage allows
_trace_headers: set[str] = set()
_unmarshal = ContentHeader.unmarshal


def tolerate_undecodable_properties() -> None:
    """Make this process deliver messages that pamqp refuses; doing so twice is fine.

    Text that is not UTF-8 arrives with the replacement character. Other properties that cannot be decoded are replaced
    by one header, `UNDECODABLE`, that holds all of them in base64. Headers for trace propagation become short text.
    """
    _trace_headers.update(propagate.get_global_textmap().fields)
    decode.METHODS["shortstr"] = _short_text
    ContentHeader.unmarshal = _unmarshal_tolerantly  # type: ignore[method-assign, assignment]  # pamqp has no hook for it


def _short_text(value: bytes) -> tuple[int, str]:
    length = value[0]
    return length + 1, value[1 : length + 1].decode(errors="replace")


def _unmarshal_tolerantly(header: ContentHeader, data: bytes) -> None:
    try:
        _unmarshal(header, data)
    except Exception as error:  # noqa: BLE001  # a decoder's errors are of many kinds
        _, header.weight, header.body_size = _FIXED_PART.unpack_from(data)
        raw = base64.b64encode(data[_FIXED_PART.size :]).decode()
        header.properties = Basic.Properties(headers={UNDECODABLE: raw})
        _log.warning(
            "the properties of a message cannot be decoded: %s", error, extra={"action": "bus.undecodable_properties"}
        )
    if headers := header.properties.headers:
        for name in _trace_headers & headers.keys():
            headers[name] = str(headers[name])[:_LONGEST_TRACE_HEADER]
