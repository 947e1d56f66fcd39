"""What tests of the bus on RabbitMQ share."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aio_pika

from events.bus import Address, Delivery, Exchange, Outgoing, Queue
from events.clock import SystemClock
from events.errors import PublishError
from events.ids import TimeOrderedIds
from events.rabbitmq import RabbitMQBus, RabbitMQOptions
from events.service import cancel_all

CHARGE = Address(Exchange.COMMANDS, "charge.card")
PAYMENTS = Queue("payments", (CHARGE,))
PATIENCE = 60  # seconds: a broker that was killed takes its time
NEVER = 1e9  # seconds between the looks of a watchdog that is not to help


def new_bus(url: str, *, read_url: Callable[[], str] | None = None, **options: Any) -> RabbitMQBus:
    return RabbitMQBus(
        url,
        read_url=read_url,
        application="tests",
        clock=SystemClock(),
        ids=TimeOrderedIds(),
        options=RabbitMQOptions(**options),
    )


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[RabbitMQBus]:
    bus = new_bus(url, **options)
    await bus.open()
    try:
        yield bus
    finally:
        await bus.close()


@asynccontextmanager
async def wire(url: str) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
    """Somebody else's channel."""
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        yield channel


async def publish_until_confirmed(bus: RabbitMQBus, message: Outgoing) -> None:
    async with asyncio.timeout(PATIENCE):
        while (await bus.publish([message]))[0] is not None:  # noqa: ASYNC110  # no event tells that it is back
            await asyncio.sleep(0.05)


class Received:
    def __init__(self) -> None:
        self._deliveries: asyncio.Queue[Delivery] = asyncio.Queue()

    def __call__(self, delivery: Delivery) -> None:
        self._deliveries.put_nowait(delivery)

    async def next(self) -> Delivery:
        async with asyncio.timeout(PATIENCE):
            return await self._deliveries.get()


class Ledger:
    """Publishes numbered commands without pause, and acknowledges and remembers all that arrive."""

    def __init__(self, bus: RabbitMQBus) -> None:
        self._bus = bus
        self._received = Received()
        self._numbers = itertools.count()
        self.confirmed: set[str] = set()
        self.arrived: set[str] = set()
        self.errors: list[PublishError] = []
        self.confirmed_some = asyncio.Event()
        self.arrived_some = asyncio.Event()

    async def consume(self) -> None:
        await self._bus.consume(PAYMENTS.name, self._received, prefetch=50)
        while True:
            delivery = await self._received.next()
            self.arrived.add(delivery.body.decode())
            self.arrived_some.set()
            await delivery.ack()

    async def publish(self) -> None:
        while True:
            texts = [f"[{next(self._numbers)}]" for _ in range(20)]
            results = await self._bus.publish([Outgoing(CHARGE, text.encode()) for text in texts])
            self.confirmed |= {text for text, error in zip(texts, results, strict=True) if error is None}
            self.errors += [error for error in results if error is not None]
            if self.confirmed:
                self.confirmed_some.set()
            await asyncio.sleep(0.01)

    async def confirms(self, more: int) -> None:
        """Return when `more` further messages were confirmed."""
        aim = len(self.confirmed) + more
        async with asyncio.timeout(PATIENCE):
            while len(self.confirmed) < aim:
                self.confirmed_some.clear()
                await self.confirmed_some.wait()

    async def everything_confirmed_arrives(self) -> None:
        async with asyncio.timeout(PATIENCE):
            while not self.confirmed <= self.arrived:
                self.arrived_some.clear()
                await self.arrived_some.wait()


@asynccontextmanager
async def under_load(bus: RabbitMQBus) -> AsyncIterator[Ledger]:
    """Publish and consume commands during the block; at its end, all that was confirmed has to arrive."""
    await bus.declare([PAYMENTS])
    ledger = Ledger(bus)
    consuming = asyncio.create_task(ledger.consume())
    publishing = asyncio.create_task(ledger.publish())
    try:
        await ledger.confirms(100)
        yield ledger
        publishing.cancel()
        await asyncio.wait([publishing])
        await ledger.everything_confirmed_arrives()
    finally:
        await cancel_all([publishing, consuming])


async def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds; look often."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # a state of the bus that no event tells
            await asyncio.sleep(0.02)
