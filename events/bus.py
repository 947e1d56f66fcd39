"""What carries messages: the port that RabbitMQ and the embedded bus implement."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from events.errors import PublishError

DEAD_LETTERS = "dead-letters"  # the queue of messages that the bus itself has given up on


class Exchange(StrEnum):
    """Where a message is published to."""

    EVENTS = "events"
    COMMANDS = "commands"
    REPLIES = "replies"

    @property
    def mandatory(self) -> bool:
        """Commands and replies must reach a queue; an event may have no receiver."""
        return self is not Exchange.EVENTS


@dataclass(frozen=True, slots=True)
class Address:
    """An exchange and the routing key in it: the type of an event or command, or a reply address."""

    exchange: Exchange
    key: str


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable queue and the addresses whose messages it gets."""

    name: str
    bindings: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message for the bus: a body of one or more envelopes for one address.

    `traceparent` is the context that the publish belongs to, `links` those of the further envelopes in the body.
    """

    address: Address
    body: bytes
    traceparent: str | None = None
    tracestate: str | None = None
    links: tuple[str, ...] = field(default=())


class Delivery(Protocol):
    """One message as received. It comes back after a crash until it is acknowledged."""

    body: bytes
    content_type: str | None
    content_encoding: str | None
    headers: Mapping[str, Any]
    redelivered: bool

    async def ack(self) -> None:
        """Say that all it caused is committed. After a lost connection this does nothing: it is redelivered."""

    async def requeue(self) -> None:
        """Give it back, to be delivered again."""


Deliver = Callable[[Delivery], None]


class Consumer(Protocol):
    """A running consumer of one queue."""

    async def cancel(self) -> None:
        """Take no more deliveries. What was delivered may still be acknowledged. Cancelling twice is fine."""


class Bus(Protocol):
    """Carries bytes from addresses to queues, at least once, in no promised order."""

    async def open(self) -> None:
        """Connect and make the exchanges exist. Returns when messages can be published."""

    async def close(self) -> None:
        """Disconnect; unacknowledged deliveries go back to their queues. Closing twice is fine."""

    async def declare(self, queues: Sequence[Queue]) -> None:
        """Make queues and bindings exist, now and after every reconnect. Declaring again is fine.

        Raises:
            ConfigurationError: a queue of this name exists with other properties.
        """

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        """Publish durably. Returns, in order, None for each confirmed message and the error of each other one."""

    async def until_writable(self) -> None:
        """Return at once if the bus takes messages now, else when it does.

        Raises:
            BusClosedError: the bus is not open.
        """

    @property
    def problem(self) -> str | None:
        """What keeps messages from being published or received, as a sentence for people; None when all is well."""

    async def consume(self, queue: str, deliver: Deliver, *, prefetch: int) -> Consumer:
        """Call `deliver` for each message of `queue`, with at most `prefetch` unacknowledged at a time.

        `deliver` must return at once; what it raises is logged and the message is given back.
        """
