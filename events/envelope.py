"""The envelope: a message with everything that travels beside its data, as CloudEvents 1.0 names it."""

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from pydantic_core import to_json

from events.derive import identify
from events.message import Message

SCHEMA_PREFIX = "urn:schema:"


class Direction(StrEnum):
    """Which way a step is taken."""

    DO = "do"
    UNDO = "undo"


class Result(StrEnum):
    """How a command ended."""

    SUCCEEDED = "succeeded"
    DECLINED = "declined"
    FAILED = "failed"


@dataclass(slots=True, frozen=True)
class SagaLink:
    """Ties a command or reply to the saga instance, step, direction and attempt it belongs to.

    A compensation also names the command that it undoes: `undoes` is its id, `undoes_type` its type.
    """

    saga_id: UUID
    step: str
    direction: Direction
    attempt: int
    result: Result | None = None
    undoes: UUID | None = None
    undoes_type: str | None = None

    def add_to(self, attributes: dict[str, Any]) -> None:
        """Write this as extension attributes of a CloudEvent."""
        attributes["sagaid"] = self.saga_id
        attributes["sagastep"] = self.step
        attributes["sagadirection"] = self.direction
        attributes["sagaattempt"] = self.attempt
        if self.result is not None:
            attributes["sagaresult"] = self.result
        if self.undoes is not None:
            attributes["sagaundoes"] = self.undoes
            attributes["sagaundoestype"] = self.undoes_type


@dataclass(slots=True)
class Envelope:
    """One CloudEvent. `data` is the JSON text of the message's data, not yet validated."""

    id: str
    source: str
    type: str
    version: int
    data: bytes
    time: datetime | None = None
    subject: str | None = None
    correlation_id: str | None = None
    causation_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    saga: SagaLink | None = None
    reply_to: str | None = None
    _key: UUID | None = field(default=None, compare=False, repr=False)

    @property
    def key(self) -> UUID:
        """What duplicates of this message have in common."""
        if self._key is None:
            self._key = identify(self.source, self.id)
        return self._key

    @property
    def content(self) -> bytes:
        """What messages with one id must have in common: a digest of type and data, 16 bytes."""
        return hashlib.blake2b(b"%b\0%b" % (self.type.encode(), self.data), digest_size=16).digest()

    def encode(self) -> bytes:
        """Return the CloudEvents JSON form of this envelope: one element of a batch."""
        attributes: dict[str, Any] = {
            "specversion": "1.0",
            "id": self.id,
            "source": self.source,
            "type": self.type,
            "dataschema": f"{SCHEMA_PREFIX}{self.type}:{self.version}",
            "datacontenttype": "application/json",
        }
        if self.time is not None:
            attributes["time"] = self.time
        if self.subject is not None:
            attributes["subject"] = self.subject
        if self.correlation_id is not None:
            attributes["correlationid"] = self.correlation_id
        if self.causation_id is not None:
            attributes["causationid"] = self.causation_id
        if self.traceparent is not None:
            attributes["traceparent"] = self.traceparent
        if self.tracestate:
            attributes["tracestate"] = self.tracestate
        if self.reply_to is not None:
            attributes["replyto"] = self.reply_to
        if self.saga is not None:
            self.saga.add_to(attributes)
        return b'%b,"data":%b}' % (to_json(attributes)[:-1], self.data)


def wrap(message: Message, *, id: str, source: str, time: datetime, **rest: Any) -> Envelope:
    """Return `message` in an envelope; `rest` are further fields of `Envelope`."""
    return Envelope(
        id=id,
        source=source,
        type=message.message_type,
        version=message.message_version,
        data=message.to_data(),
        time=time,
        **rest,
    )
