"""What must exist on RabbitMQ: exchanges, quorum queues, bindings, and where dead letters go."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Iterator
from typing import Any

from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractRobustChannel, AbstractRobustQueue
from aio_pika.exceptions import AMQPError, ChannelPreconditionFailed
from pamqp.exceptions import PAMQPException

from events.bus import DEAD_LETTERS, Exchange, Queue
from events.errors import BusClosedError, ConfigurationError
from events.service import is_cancelled

_log = logging.getLogger(__name__)
_UNLIMITED = 2**31 - 1  # by default RabbitMQ 4 drops what came back 20 times to a queue without dead letter exchange
_EXCHANGE_TYPES = {
    Exchange.EVENTS: ExchangeType.TOPIC,
    Exchange.COMMANDS: ExchangeType.DIRECT,
    Exchange.REPLIES: ExchangeType.DIRECT,
}


class Topology:
    """Declares the parts of one deployment. What a robust channel has declared it declares again when restored.

    Args:
        namespace: the first part of all names.
        application: whose queues these are; None where nothing is consumed.
        delivery_limit: how often a message may come back before it goes to the dead letters.
        timeout: seconds for each answer of the broker.
    """

    def __init__(self, namespace: str, *, application: str | None, delivery_limit: int, timeout: float) -> None:
        self._namespace = namespace
        self._application = application
        self._delivery_limit = delivery_limit
        self._timeout = timeout

    def name(self, part: str) -> str:
        """Return the name of an exchange or queue on the broker."""
        return f"{self._namespace}.{part}"

    async def declare_exchanges(self, channel: AbstractChannel) -> dict[Exchange, AbstractExchange]:
        """Declare the three exchanges that messages are published to."""
        return {
            exchange: await self._declare_exchange(channel, exchange.value, kind)
            for exchange, kind in _EXCHANGE_TYPES.items()
        }

    async def declare_queue(self, channel: AbstractRobustChannel, queue: Queue) -> AbstractRobustQueue:
        """Declare `queue` with its bindings.

        Raises:
            ConfigurationError: a queue of this name exists with other properties, or nobody knows whose it would be.
        """
        if self._application is None:
            raise ConfigurationError(f"queue {queue.name} belongs to no application; name the one that consumes it")
        if queue.name == DEAD_LETTERS:
            return await self._declare_dead_letters(channel, self._application)
        declared = await self._declare_queue(
            channel,
            queue.name,
            {
                "x-queue-type": "quorum",
                "x-delivery-limit": self._delivery_limit,
                "x-dead-letter-exchange": self.name(DEAD_LETTERS),
                "x-dead-letter-routing-key": self._application,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",  # without it RabbitMQ falls back to dead-lettering at most once
            },
        )
        for address in queue.bindings:
            await declared.bind(self.name(address.exchange.value), address.key, timeout=self._timeout)
        return declared

    async def _declare_dead_letters(self, channel: AbstractRobustChannel, application: str) -> AbstractRobustQueue:
        """Declare where RabbitMQ puts what came back too often; applications on one broker may not share a database."""
        exchange = await self._declare_exchange(channel, DEAD_LETTERS, ExchangeType.DIRECT)
        declared = await self._declare_queue(
            channel, f"{DEAD_LETTERS}.{application}", {"x-queue-type": "quorum", "x-delivery-limit": _UNLIMITED}
        )
        await declared.bind(exchange.name, application, timeout=self._timeout)
        return declared

    async def _declare_exchange(self, channel: AbstractChannel, part: str, kind: ExchangeType) -> AbstractExchange:
        try:
            return await channel.declare_exchange(self.name(part), kind, durable=True, timeout=self._timeout)
        except ChannelPreconditionFailed as error:
            raise self._other_shape("exchange", part, error) from error

    async def _declare_queue(
        self, channel: AbstractRobustChannel, part: str, arguments: dict[str, Any]
    ) -> AbstractRobustQueue:
        try:
            return await channel.declare_queue(
                self.name(part), durable=True, arguments=arguments, timeout=self._timeout
            )
        except ChannelPreconditionFailed as error:
            raise self._other_shape("queue", part, error) from error

    def _other_shape(self, kind: str, part: str, error: Exception) -> ConfigurationError:
        return ConfigurationError(
            f"{kind} {self.name(part)} exists with other properties; if it is another application's, give the handler"
            " another name, or use another namespace; if not, stop its users, empty and delete it, and start again"
            f" ({error})"
        )


@contextlib.contextmanager
def library_errors(action: str) -> Iterator[None]:
    """Turn what aio-pika raises when its connection is lost, a foreign `CancelledError` too, into `BusClosedError`."""
    try:
        yield
    except asyncio.CancelledError as error:
        if is_cancelled():
            raise
        raise BusClosedError(f"could not {action}: the connection to RabbitMQ was lost") from error
    except (AMQPError, PAMQPException, OSError, RuntimeError) as error:
        raise BusClosedError(f"could not {action}: {type(error).__name__}: {error}") from error


async def close_quietly(closing: Awaitable[None], *, within: float) -> None:
    """Await the closing of a channel or connection that may be broken."""
    try:
        with library_errors("close"):
            async with asyncio.timeout(within):
                await closing
    except BusClosedError as error:
        _log.debug("%s", error, extra={"action": "bus.close_failed"})
