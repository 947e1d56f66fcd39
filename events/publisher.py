"""Publishing without a database transaction: confirmed by the bus, or an error."""

from collections.abc import Sequence

from events import tracing
from events.bus import Bus, Outgoing
from events.clock import Clock
from events.codec import Limits, bundle_body
from events.envelope import Envelope, wrap
from events.ids import Ids
from events.message import Command, Event
from events.outbox import Outbound, route


class Publisher:
    """Publishes events and commands directly.

    Use it where there is nothing to commit; where there is, use `ServiceOutbox`: between a commit and a
    direct publish a crash loses the message.

    Args:
        bus: an open bus.
        source: who speaks: the CloudEvents `source` of all messages, a URI reference.
    """

    def __init__(self, bus: Bus, source: str, *, clock: Clock, ids: Ids, limits: Limits) -> None:
        self._bus = bus
        self._source = source
        self._clock = clock
        self._ids = ids
        self._limits = limits

    async def publish(
        self, message: Event | Command, *, id: str | None = None, correlation_id: str | None = None
    ) -> str:
        """Publish one message and return its event id.

        Raises:
            PublishError: the bus did not confirm it; it may have arrived, so try again with the same `id`.
            UnroutableError: a command that no queue takes.
            TooLargeError: no receiver would take it.
        """
        with tracing.created(message.message_type) as context:
            envelope = wrap(
                message,
                id=id or str(self._ids.new()),
                source=self._source,
                time=self._clock.now(),
                correlation_id=correlation_id,
                traceparent=context.traceparent,
                tracestate=context.tracestate,
            )
            await self.send([self.prepare(envelope, message)])
        return envelope.id

    async def send(self, messages: Sequence[Outgoing]) -> None:
        """Publish prepared messages; the first error is raised after all were tried."""
        for error in await self._bus.publish(messages):
            if error is not None:
                raise error

    def prepare(self, envelope: Envelope, message: Event | Command) -> Outgoing:
        """Return `envelope`, which came from elsewhere and was read as `message`, ready for `send`."""
        outbound = Outbound(envelope, route(message))
        body = bundle_body([outbound.encode(self._limits)])
        return Outgoing(outbound.address, body, traceparent=envelope.traceparent, tracestate=envelope.tracestate)
