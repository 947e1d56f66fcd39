"""The bus on RabbitMQ: quorum queues, confirmed publishes, two connections that come back by themselves.

aio-pika restores connections, channels and consumers. What it leaves to us is done here: nothing of the library may
escape to a caller (a lost connection ends in `CancelledError`s), a publish has one outcome, and consumers that were
not restored are found by a watchdog.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from aio_pika import DeliveryMode, Message, RobustConnection
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractRobustChannel
from aio_pika.exceptions import (
    DeliveryError,
)
from aio_pika.exceptions import PublishError as ReturnedError
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from events import tracing
from events.bus import DEAD_LETTERS, Consumer, Deliver, Exchange, Outgoing, Queue
from events.clock import Clock
from events.codec import BATCH_TYPE
from events.errors import BusClosedError, ConfigurationError, CoordinatorError, PublishError, UnroutableError
from events.ids import Ids
from events.rabbitmq_connection import Broker, is_blocked, is_closed, is_up
from events.rabbitmq_consumer import RabbitMQConsumer
from events.rabbitmq_topology import Topology, close_quietly, library_errors
from events.rabbitmq_watchdog import Broken, Restart, Watchdog
from events.rabbitmq_wire import tolerate_undecodable_properties
from events.service import Supervisor, is_cancelled

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_FORGET_STALL_AFTER = 60.0  # seconds without a publish; until then a process that publishes has asked again
_LOOK_EVERY = 0.2  # seconds; only short looks at flags of this process
_PUBLISH, _CONSUME = "publish", "consume"  # what a connection is for


@dataclass(frozen=True, slots=True)
class RabbitMQOptions:
    """How the bus talks to RabbitMQ.

    Attributes:
        client_name: what the connections are called in RabbitMQ's management pages.
        connect_timeout: seconds for the first connection; later ones are tried for ever.
        publish_timeout: seconds that a publish waits for its confirm. Keep it below the lease of the relay.
        in_flight: publishes of one call that wait for their confirms at a time.
        delivery_limit: how often a message may come back before RabbitMQ moves it to the dead letters.
        watch_every: seconds between looks for channels and consumers that were not restored.
        reconcile_every: seconds between looks for what RabbitMQ itself has lost: queues, bindings, consumers.
    """

    client_name: str = "saga-coordinator"
    connect_timeout: float = 10.0
    publish_timeout: float = 10.0
    in_flight: int = 64
    delivery_limit: int = 20
    watch_every: float = 5.0
    reconcile_every: float = 30.0


class RabbitMQBus:
    """A bus on RabbitMQ 3.10 or later.

    Args:
        url: `amqp://user:password@host:5672/vhost`, or `amqps://` for TLS.
        read_url: returns the URL as it is now; asked while a connection is lost, since the password may have changed.
        namespace: the first part of the names of all exchanges and queues; one per deployment.
        application: whose queues are declared here: what RabbitMQ gives up on in them goes to a queue of its own. None
            where nothing is consumed.
        clock: paces the watchdog.
        ids: names each publish attempt.
        options: timeouts and limits.

    Raises:
        ConfigurationError: the URL cannot be read.
    """

    def __init__(
        self,
        url: str,
        *,
        read_url: Callable[[], str] | None = None,
        namespace: str = "saga",
        application: str | None = None,
        clock: Clock,
        ids: Ids,
        options: RabbitMQOptions | None = None,
    ) -> None:
        self._clock = clock
        self._ids = ids
        self._options = options = options or RabbitMQOptions()
        self._broker = Broker(url, read_url=read_url, client_name=options.client_name, timeout=options.connect_timeout)
        self._application = application
        self._topology = Topology(
            namespace,
            application=application,
            delivery_limit=options.delivery_limit,
            timeout=options.connect_timeout,
        )
        self._supervisor = Supervisor(clock)
        self._publishing: RobustConnection | None = None
        self._consuming: RobustConnection | None = None
        self._declarer: AbstractRobustChannel | None = None
        self._publisher: AbstractChannel | None = None
        self._exchanges: dict[Exchange, AbstractExchange] = {}
        self._queues: dict[str, Queue] = {}
        self._declared = False  # whether they exist, for all we know
        self._consumers: list[RabbitMQConsumer] = []
        self._stalled = False
        self._stalled_at = 0.0
        self._watchdog = Watchdog(
            is_up=self._is_up,
            renew=self._renew_url,
            broken=self._broken,
            reconcile=self._reconcile,
            clock=clock,
            every=options.watch_every,
            reconcile_every=options.reconcile_every,
            timeout=options.connect_timeout,
        )

    # Bus

    async def open(self) -> None:
        """Connect; fails at once where there is no broker, so that a wrong URL is seen.

        Raises:
            BusClosedError: there is no broker, or it does not answer within `connect_timeout`.
            ConfigurationError: the broker refuses the user, or has an exchange or queue of ours in another shape.
        """
        if self._publishing is not None:
            return
        tolerate_undecodable_properties()
        try:
            async with asyncio.timeout(self._options.connect_timeout):
                self._publishing = await self._broker.connect(_PUBLISH)
                self._consuming = await self._broker.connect(_CONSUME)
                self._consuming.close_callbacks.add(self._forget_queues)
                if self._application is not None:
                    self._queues[DEAD_LETTERS] = Queue(DEAD_LETTERS, ())
                with library_errors("declare the exchanges"):
                    await self._open_publisher()
                    await self._open_declarer()
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise BusClosedError(
                    f"RabbitMQ at {self._broker.place} did not answer within {self._options.connect_timeout:g} s"
                ) from error
            raise
        self._supervisor.start("rabbitmq.watch", self._watchdog.run)
        self._supervisor.start("rabbitmq.report", self._report_blocking)

    async def close(self) -> None:
        """See `Bus.close`."""
        await self._supervisor.stop()
        consumers, self._consumers = self._consumers, []
        publishing, self._publishing = self._publishing, None
        consuming, self._consuming = self._consuming, None
        self._declarer = None
        self._publisher = None
        self._exchanges = {}
        self._queues = {}
        self._watchdog.failures.clear()
        # A channel closes in order behind the acknowledgements sent before; a connection would overtake them.
        for consumer in consumers:
            await consumer.close()
        for connection in (publishing, consuming):
            if connection is not None:
                await close_quietly(connection.close(), within=self._options.connect_timeout)

    async def declare(self, queues: Sequence[Queue]) -> None:
        """See `Bus.declare`."""
        for queue in queues:
            with library_errors(f"declare queue {queue.name}"):
                async with asyncio.timeout(self._options.connect_timeout):
                    try:
                        await self._topology.declare_queue(_opened(self._declarer), queue)
                    except ConfigurationError:
                        await self._open_declarer()  # the refusal has cost the channel
                        raise
            known = self._queues.get(queue.name)
            bindings = dict.fromkeys((*known.bindings, *queue.bindings) if known else queue.bindings)
            self._queues[queue.name] = Queue(queue.name, tuple(bindings))

    async def publish(self, messages: Sequence[Outgoing]) -> Sequence[PublishError | None]:
        """See `Bus.publish`. Without a connection all fail at once; whoever keeps the messages tries again."""
        _opened(self._publishing)
        results: list[PublishError | None] = [None] * len(messages)
        traced = not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        waiting = iter(range(len(messages)))
        if self._stalled:
            # The last publish was not answered. One more is enough to find out whether the broker is back; the
            # others would only pile up in front of it, to arrive twice.
            for index in islice(waiting, 1):
                results[index] = await self._publish(messages[index], traced=traced)

        async def publish_waiting() -> None:
            for index in waiting:
                if self._stalled:
                    results[index] = self._no_answer()
                else:
                    results[index] = await self._publish(messages[index], traced=traced)

        workers = min(len(messages), self._options.in_flight)
        if workers == 1:
            await publish_waiting()
        elif workers:
            await asyncio.gather(*(publish_waiting() for _ in range(workers)))
        return results

    async def consume(self, queue: str, deliver: Deliver, *, prefetch: int) -> Consumer:
        """See `Bus.consume`. After `delivery_limit` failures of `deliver` a message goes to the dead letters."""
        _opened(self._consuming)
        if (declared := self._queues.get(queue)) is None:
            raise ConfigurationError(f"queue {queue!r} is not declared; call declare() first")
        consumer = RabbitMQConsumer(
            declared,
            deliver,
            prefetch=prefetch,
            topology=self._topology,
            open_channel=self._open_channel,
            forget=self._forget,
            timeout=self._options.publish_timeout,
        )
        try:
            with library_errors(f"consume {queue}"):
                async with asyncio.timeout(self._options.connect_timeout):
                    await consumer.start()
        except BaseException:
            await consumer.close()
            raise
        self._consumers.append(consumer)
        return consumer

    async def until_writable(self) -> None:
        """See `Bus.until_writable`. A broker that has not confirmed the last message is asked again with the next."""
        # By looking: a channel that the library has given up on is replaced without any event that tells.
        _opened(self._publishing)
        while self._obstacle is not None:
            await self._clock.sleep(_LOOK_EVERY)
            _opened(self._publishing)

    @property
    def problem(self) -> str | None:
        """See `Bus.problem`."""
        if self._publishing is None:
            return "the bus is not open"
        if self._obstacle is not None:
            return self._obstacle
        if self._stalled and self._clock.monotonic() - self._stalled_at < _FORGET_STALL_AFTER:
            return "RabbitMQ does not confirm what is published"
        return next(iter(self._watchdog.failures.values()), None)

    # Connecting

    @property
    def _obstacle(self) -> str | None:
        """What makes a publish pointless now."""
        if not is_up(self._publishing):
            return f"the connection to RabbitMQ at {self._broker.place} is lost"
        if is_blocked(self._publishing):
            return "RabbitMQ has blocked publishing: it is low on memory or disk space"
        if is_closed(self._publisher):
            return "the channel to publish on is closed"
        if not is_up(self._consuming):
            return f"the connection to RabbitMQ at {self._broker.place} is lost"
        if not self._declared:  # RabbitMQ may have lost the queues, and an event would find none
            return "the queues are not declared again yet"
        return None

    def _is_up(self) -> bool:
        return is_up(self._publishing) and is_up(self._consuming)

    def _renew_url(self) -> None:
        self._broker.renew((self._publishing, _PUBLISH), (self._consuming, _CONSUME))

    async def _open_publisher(self) -> None:
        connection = _opened(self._publishing)
        if self._publisher is not None:
            await close_quietly(self._publisher.close(), within=self._options.connect_timeout)
        self._publisher = channel = connection.channel(publisher_confirms=True, on_return_raises=True)
        channel.reopen_callbacks.add(self._forget_stall)
        await channel.initialize(timeout=self._options.connect_timeout)
        self._forget_stall()
        self._exchanges = await self._topology.declare_exchanges(channel)

    async def _open_declarer(self) -> None:
        """Open a channel that declares everything, now and whenever it is restored."""
        if self._declarer is not None:
            await close_quietly(self._declarer.close(), within=self._options.connect_timeout)
        self._declarer = channel = await self._open_channel()
        channel.reopen_callbacks.add(self._remember_queues)
        # The exchanges here as well: queues are bound on this connection, which may be back before the other.
        await self._topology.declare_exchanges(channel)
        for queue in self._queues.values():
            await self._topology.declare_queue(channel, queue)
        self._remember_queues()

    def _forget_queues(self, *_: object) -> None:
        """A connection that comes back may lead to another, empty broker."""
        self._declared = False

    def _remember_queues(self, *_: object) -> None:
        self._declared = True

    async def _open_channel(self) -> AbstractRobustChannel:
        """Open a channel on the consuming connection."""
        channel: AbstractRobustChannel = _opened(self._consuming).channel(publisher_confirms=False)
        await channel.initialize(timeout=self._options.connect_timeout)
        return channel

    def _forget(self, consumer: RabbitMQConsumer) -> None:
        with contextlib.suppress(ValueError):
            self._consumers.remove(consumer)

    # Publishing

    async def _publish(self, message: Outgoing, *, traced: bool) -> PublishError | None:
        """Publish one message; nothing but our own cancellation is raised."""
        try:
            if not traced:
                await self._send(message)
            elif message.links:
                with tracing.span("publish bundle", parent=tracing.ROOT, kind=SpanKind.PRODUCER, links=message.links):
                    await self._send(message)
            else:
                with tracing.in_context(tracing.context_of(message.traceparent, message.tracestate)):
                    await self._send(message)
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            return PublishError("the connection to RabbitMQ was lost before the message was confirmed")
        except ReturnedError:
            self._stalled = False
            return UnroutableError(
                f"no queue takes {message.address.exchange.value} {message.address.key};"
                " start the service whose handler receives it"
            )
        except DeliveryError:
            self._stalled = False
            return PublishError("RabbitMQ did not take the message: a queue is full or not available")
        except TimeoutError:
            self._stalled, self._stalled_at = True, self._clock.monotonic()
            return self._no_answer()
        except Exception as error:  # noqa: BLE001  # one message must not spoil the others of its call
            return PublishError(f"the message was not confirmed: {type(error).__name__}: {error}")
        self._stalled = False
        return None

    async def _send(self, message: Outgoing) -> None:
        exchange = self._exchanges.get(message.address.exchange)
        # Without this look aio-pika would wait for the connection, outside of the timeout.
        if exchange is None or not (self._declared and is_up(self._publishing)):
            raise ConnectionError("there is no connection to RabbitMQ")
        await exchange.publish(
            Message(
                message.body,
                content_type=BATCH_TYPE,
                delivery_mode=DeliveryMode.PERSISTENT,
                # aiormq tells returned messages apart by this id: each attempt has its own
                message_id=self._ids.new().hex,
            ),
            message.address.key,
            mandatory=message.address.exchange.mandatory,
            timeout=self._options.publish_timeout,
        )

    def _forget_stall(self, *_: object) -> None:
        """Begin anew on a new channel: nothing that was published on it is unanswered."""
        self._stalled = False

    def _no_answer(self) -> PublishError:
        reason = f": {self._obstacle}" if self._obstacle else ""
        return PublishError(f"RabbitMQ did not confirm the message in time{reason}")

    # Watching

    async def _report_blocking(self) -> None:
        """Log once when RabbitMQ blocks publishing, and once when that is over."""
        while True:
            await self._clock.sleep(_LOOK_EVERY)
            if not is_blocked(self._publishing):
                continue
            _log.warning("%s; messages wait until it takes them again", self._obstacle, extra={"action": "bus.blocked"})
            while is_blocked(self._publishing):
                await self._clock.sleep(_LOOK_EVERY)
            _log.warning("RabbitMQ no longer blocks publishing", extra={"action": "bus.unblocked"})

    async def _broken(self) -> Broken:
        """Look at this side: channels that are closed, consumers that no channel knows."""
        broken: dict[Restart, str] = {}
        if is_closed(self._publisher):
            broken[self._open_publisher] = "the publisher"
        if is_closed(self._declarer):
            broken[self._open_declarer] = "the declarer of queues"
        for consumer in tuple(self._consumers):
            if await consumer.is_deaf():
                broken[consumer.start] = f"the consumer of {consumer.queue.name}"
        return broken

    async def _reconcile(self) -> Broken:
        """Look at the other side: make what was declared exist, and return the consumers that RabbitMQ lacks.

        It does not name the consumers that it has. One of ours is missing where there are none, and where messages wait
        but none comes to it: those of other processes may be too slow to hide that.
        """
        unserved: dict[Restart, str] = {}
        for queue in tuple(self._queues.values()):
            try:
                with library_errors(f"look at queue {queue.name}"):
                    async with asyncio.timeout(self._options.connect_timeout):
                        consumers, waiting = await self._declare_again(queue)
            except CoordinatorError as error:
                if self._watchdog.failures.get(queue.name) != str(error):
                    _log.error("%s", error, extra={"action": "bus.reconcile_failed", "queue": queue.name})
                self._watchdog.failures[queue.name] = str(error)
                continue
            self._watchdog.failures.pop(queue.name, None)
            for consumer in self._consumers:
                if consumer.queue.name != queue.name or consumer.is_cancelled:
                    continue
                passed_over = consumer.was_passed_over()
                if consumers == 0 or (waiting and passed_over):
                    unserved[consumer.start] = f"the consumer of {queue.name}"
        return unserved

    async def _declare_again(self, queue: Queue) -> tuple[int, int]:
        """Declare `queue` and return how many consumers it has, and how many messages wait for one."""
        channel = await self._open_channel()  # of its own: a refusal costs it
        try:
            declared = await self._topology.declare_queue(channel, queue)
        finally:
            await close_quietly(channel.close(), within=self._options.connect_timeout)
        result = declared.declaration_result
        return result.consumer_count or 0, result.message_count or 0


def _opened(part: _T | None) -> _T:
    if part is None:
        raise BusClosedError
    return part
