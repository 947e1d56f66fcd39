"""Messages to be sent, written in the transaction that causes them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session, registry

from events import tracing
from events.bus import Address, Delivery, Exchange
from events.clock import Clock, SystemClock
from events.codec import STRUCTURED_TYPE, Limits, Readable, read_body
from events.envelope import Envelope, wrap
from events.errors import InvalidMessageError, TooLargeError
from events.ids import Ids, TimeOrderedIds
from events.message import DEFAULT_BUNDLE, Command, Event, Message
from events.tables import outbox as outbox_table

_mapper_registry = registry()
_nul = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_AT_ONCE = datetime(1970, 1, 1, tzinfo=UTC)  # no process holds a lease on the row


@dataclass(slots=True)
class Outbound:
    """An envelope with its way: where it goes and how many of its kind may share one AMQP message."""

    envelope: Envelope
    address: Address
    bundle: int = DEFAULT_BUNDLE
    _encoded: bytes | None = None

    def encode(self, limits: Limits) -> bytes:
        """Return the encoded envelope, which is made once.

        Raises:
            TooLargeError, InvalidMessageError: no receiver would take it.
        """
        if self._encoded is None:
            encoded = self.envelope.encode()
            if b"\\u0000" in encoded and _nul.search(encoded):
                raise InvalidMessageError(
                    f"{self.envelope.type} {self.envelope.id} contains NUL, which no receiver takes"
                )
            if len(encoded) + 2 > limits.body:  # the brackets of the batch around it
                raise TooLargeError(
                    f"{self.envelope.type} {self.envelope.id} has {len(encoded)} bytes, the limit is"
                    f" {limits.body - 2}; send a reference to the data instead"
                )
            self._encoded = encoded
        return self._encoded


AfterCommit = Callable[[], None]


class Outbox(Protocol):
    """Where a transaction leaves the messages that it causes."""

    async def write(
        self, connection: AsyncConnection, messages: Sequence[Outbound], settling: Sequence[Delivery] = ()
    ) -> AfterCommit:
        """Store `messages` in the open transaction of `connection`.

        The caller calls what is returned once the transaction is committed, and never if it is not.

        `settling` are the deliveries whose work this transaction completes. A bus that lives in the same database
        removes them in the same commit; the caller acknowledges them afterwards in any case.
        """


def route(message: Message) -> Address:
    """Return where an event or a command goes: its exchange, under its type."""
    exchange = Exchange.COMMANDS if isinstance(message, Command) else Exchange.EVENTS
    return Address(exchange, message.message_type)


def recorded_reply(encoded: bytes, reply_to: str) -> Outbound:
    """Return a reply that was stored encoded, ready to be sent again.

    Raises:
        RejectedError: the stored bytes are no envelope.
    """
    part = read_body(encoded, content_type=STRUCTURED_TYPE, headers={}, encoding=None, limits=Limits(len(encoded)))[0]
    if not isinstance(part, Readable):
        raise part.error
    return Outbound(part.envelope, Address(Exchange.REPLIES, reply_to), _encoded=encoded)


class _Row:
    """A row of the outbox as an ORM object, so that savepoints and rollbacks of a session apply to it."""


_mapper_registry.map_imperatively(_Row, outbox_table)

ADDED = "saga_coordinator.outbox"  # set in `Session.info` when a session has something for the relay


class ServiceOutbox:
    """The outbox of a service: events and commands that are sent if, and only if, its own transaction commits.

        outbox = ServiceOutbox("/shop")
        with Session(engine) as session, session.begin():
            session.add(order)
            outbox.add(session, OrderPlaced(order_id=order.id))

    A `Relay` on the same database publishes them: in the same process, or alone as `coordinator relay`.

    Args:
        source: who speaks: the CloudEvents `source` of all messages, a URI reference.
    """

    def __init__(
        self, source: str, *, clock: Clock | None = None, ids: Ids | None = None, limits: Limits | None = None
    ) -> None:
        self._source = source
        self._clock = clock or SystemClock()
        self._ids = ids or TimeOrderedIds()
        self._limits = limits or Limits()

    def add(
        self,
        session: Session | AsyncSession,
        message: Event | Command,
        *,
        id: str | None = None,
        correlation_id: str | None = None,
        causation_id: str | None = None,
    ) -> str:
        """Add `message` to the session's transaction and return its event id.

        Args:
            session: an `AsyncSession` or a sync `Session`; the message follows its savepoints and its rollback.
            message: what to send.
            id: the event id; a fresh one by default. The same id twice is a duplicate to every receiver.
            correlation_id: what the message belongs to, kept by everything that follows from it.
            causation_id: the id of the message that caused this one.

        Raises:
            TooLargeError: no receiver would take it; the transaction is still usable.
        """
        with tracing.created(message.message_type) as context:
            envelope = wrap(
                message,
                id=id or str(self._ids.new()),
                source=self._source,
                time=self._clock.now(),
                correlation_id=correlation_id,
                causation_id=causation_id,
                traceparent=context.traceparent,
                tracestate=context.tracestate,
            )
        row = _Row()
        outbound = Outbound(envelope, route(message), message.bundle_limit)
        values = {
            "id": self._ids.new(),
            "exchange": outbound.address.exchange.value,
            "routing_key": outbound.address.key,
            "bundle": outbound.bundle,
            "body": outbound.encode(self._limits),
            "traceparent": envelope.traceparent,
            "tracestate": envelope.tracestate,
            "attempts": 0,
            "due_at": _AT_ONCE,
        }
        for name, value in values.items():
            setattr(row, name, value)
        session.add(row)
        session.info[ADDED] = True
        return envelope.id
