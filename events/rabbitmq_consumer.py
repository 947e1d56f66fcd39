"""Consuming from RabbitMQ: deliveries that outlive their channel, consumers that fail alone."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aio_pika.abc import AbstractIncomingMessage, AbstractRobustChannel, AbstractRobustQueue
from aio_pika.exceptions import ChannelInvalidStateError
from aiormq.abc import AbstractChannel as WireChannel

from events.bus import Deliver, Queue
from events.errors import BusClosedError
from events.rabbitmq_topology import Topology, close_quietly, library_errors

_log = logging.getLogger(__name__)

OpenChannel = Callable[[], Awaitable[AbstractRobustChannel]]


class RabbitMQDelivery:
    """A message as received. It belongs to a channel that may be gone by the time it is settled."""

    __slots__ = (
        "_channel",
        "_consumer",
        "_settled",
        "_tag",
        "body",
        "content_encoding",
        "content_type",
        "headers",
        "redelivered",
    )

    def __init__(self, message: AbstractIncomingMessage, channel: WireChannel, consumer: "RabbitMQConsumer") -> None:
        self.body = message.body
        self.content_type = message.content_type
        self.content_encoding = message.content_encoding
        self.headers: Mapping[str, Any] = message.headers
        self.redelivered = bool(message.redelivered)
        self._channel = channel
        self._tag = message.delivery_tag or 0
        self._consumer = consumer
        self._settled = False

    async def ack(self) -> None:
        """See `Delivery.ack`."""
        if not self._settled:
            await self._settle(self._channel.basic_ack(self._tag, wait=False))

    async def requeue(self) -> None:
        """See `Delivery.requeue`."""
        if not self._settled:
            await self._settle(self._channel.basic_nack(self._tag, requeue=True, wait=False))

    async def reject(self) -> None:
        """Give it back in the way that counts towards the delivery limit on every version of RabbitMQ."""
        if not self._settled:
            await self._settle(self._channel.basic_reject(self._tag, requeue=True, wait=False))

    async def _settle(self, sending: Awaitable[None]) -> None:
        self._settled = True
        try:
            with library_errors("settle a delivery"):
                async with asyncio.timeout(self._consumer.timeout):  # nobody empties the buffer of a dead connection
                    await sending
        except BusClosedError as error:
            # RabbitMQ took it back when the channel closed, and delivers it again.
            _log.debug("%s", error, extra={"action": "bus.settle_failed"})
        finally:
            await self._consumer.settled()


class RabbitMQConsumer:
    """A consumer on a channel of its own, so that it has its own prefetch and fails alone.

    Args:
        queue: what to consume; it is declared, also when RabbitMQ has lost it.
        deliver: see `Bus.consume`.
        prefetch: see `Bus.consume`.
        open_channel: opens a channel on the connection to consume on.
        forget: called when the consumer is cancelled and its channel of no more use.
    """

    def __init__(
        self,
        queue: Queue,
        deliver: Deliver,
        *,
        prefetch: int,
        topology: Topology,
        open_channel: OpenChannel,
        forget: Callable[["RabbitMQConsumer"], None],
        timeout: float,
    ) -> None:
        self.queue = queue
        self.timeout = timeout
        self._deliver = deliver
        self._prefetch = prefetch
        self._topology = topology
        self._open_channel = open_channel
        self._forget = forget
        self._channel: AbstractRobustChannel | None = None
        self._source: AbstractRobustQueue | None = None
        self._tag = ""
        self._unsettled = 0
        self._was_given_some = False
        self._cancelled = False

    async def start(self) -> None:
        """Open a channel and consume. Starting again replaces the channel; after `cancel` it does nothing."""
        if self._cancelled:
            return
        await self._close_channel()
        self._channel = await self._open_channel()
        await self._channel.set_qos(self._prefetch)
        self._source = await self._topology.declare_queue(self._channel, self.queue)
        self._tag = await self._source.consume(self._take)
        if self._cancelled:  # while it was starting
            await self._close_channel()

    @property
    def is_cancelled(self) -> bool:
        """Whether it is to take no more deliveries."""
        return self._cancelled

    async def is_deaf(self) -> bool:
        """Whether there is a connection, but nothing is consumed on it as far as this side knows."""
        if self._cancelled:
            return False
        if self._channel is None or self._channel.is_closed:
            return True
        try:
            wire: Any = await self._channel.get_underlay_channel()
        except ChannelInvalidStateError:  # closed since
            return True
        return self._tag not in wire.consumers

    def was_passed_over(self) -> bool:
        """Whether nothing was delivered to it since the last call, though it has room for more."""
        idle, self._was_given_some = not self._was_given_some, False
        return idle and self._unsettled < self._prefetch

    async def cancel(self) -> None:
        """See `Consumer.cancel`. The channel stays open until the last delivery is settled.

        Without RabbitMQ's answer it is closed for good: aio-pika would consume again when it restores the channel, and
        what was delivered on it cannot be settled any more.
        """
        if self._cancelled:
            return
        self._cancelled = True
        if await self._is_told_to_stop():
            await self._close_if_settled()
        else:
            self._forget(self)
            await self._close_channel()

    async def _is_told_to_stop(self) -> bool:
        """Ask RabbitMQ to deliver no more; say whether it has answered."""
        if self._source is None or self._channel is None or self._channel.is_closed:
            return False
        try:
            with library_errors(f"cancel the consumer of {self.queue.name}"):
                async with asyncio.timeout(self.timeout):
                    await self._channel.ready()  # while it is being restored, the consumer would come after the cancel
                    await self._source.cancel(self._tag)
        except BusClosedError as error:
            _log.debug("%s", error, extra={"action": "bus.cancel_failed"})
            return False
        return True

    async def close(self) -> None:
        """Close the channel; what is unsettled goes back to the queue."""
        self._cancelled = True
        await self._close_channel()

    async def settled(self) -> None:
        """Count a delivery that was settled."""
        self._unsettled -= 1
        if self._cancelled:
            await self._close_if_settled()

    async def _close_if_settled(self) -> None:
        if self._unsettled == 0:
            self._forget(self)
            await self._close_channel()

    async def _close_channel(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await close_quietly(channel.close(), within=self.timeout)

    async def _take(self, message: AbstractIncomingMessage) -> None:
        try:
            channel = message.channel
        except ChannelInvalidStateError:
            return  # it closed since, and the message is back in its queue
        self._unsettled += 1
        self._was_given_some = True
        delivery = RabbitMQDelivery(message, channel, self)
        if self._cancelled:
            await delivery.requeue()
            return
        try:
            self._deliver(delivery)
        except Exception:  # noqa: BLE001  # not ours: whatever it is, the message must not be lost
            _log.exception(
                "a message of queue %s could not be taken and is given back",
                self.queue.name,
                extra={"action": "bus.deliver_failed", "queue": self.queue.name},
            )
            await delivery.reject()
