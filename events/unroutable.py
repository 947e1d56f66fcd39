"""Messages that no queue has taken for too long: they leave the outbox for the dead letters."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from events.bus import Address
from events.codec import STRUCTURED_TYPE, Limits
from events.dead_letters import BUS, DeadLetter
from events.errors import UnroutableError
from events.intake import Intake

_log = logging.getLogger(__name__)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(slots=True)
class _Unsent:
    """A message that was never delivered, in the shape of a delivery."""

    body: bytes
    headers: Mapping[str, Any] = field(default_factory=dict)
    content_type: str | None = STRUCTURED_TYPE
    content_encoding: str | None = None
    redelivered: bool = False

    async def ack(self) -> None:
        """Nobody waits for that."""

    async def requeue(self) -> None:
        """There is no queue."""


def age_of(id: UUID, now: datetime) -> timedelta:
    """Return how old a row is, by the time in its id (UUIDv7: RFC 9562, section 5.7)."""
    return now - (_EPOCH + timedelta(milliseconds=id.int >> 80))


def unroutable_letter(body: bytes, address: Address, error: UnroutableError, attempts: int) -> DeadLetter:
    """Return the dead letter for an envelope of the outbox; its headers say where it was to go."""
    headers = {"exchange": address.exchange.value, "routing_key": address.key}
    [item] = Intake(Limits(len(body))).read(_Unsent(body, headers))
    return DeadLetter(item, BUS, error.code, str(error), attempts)


def log_given_up(address: Address) -> None:
    """Say that a message is a dead letter now; to be called after the commit."""
    _log.error(
        "no queue has taken %s %s for too long; it is a dead letter now",
        address.exchange.value,
        address.key,
        extra={"action": "relay.given_up", "routing_key": address.key},
    )
