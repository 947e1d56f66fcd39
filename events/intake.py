"""Deliveries in, batches out: takes what is there, waits only when there is nothing."""

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from events import tracing
from events.bus import Delivery
from events.codec import Limits, Part, read_body


class _Bundle:
    """Counts the parts of a delivery that are not settled yet."""

    __slots__ = ("delivery", "parts", "unsettled")

    def __init__(self, delivery: Delivery, parts: int) -> None:
        self.delivery = delivery
        self.parts = parts
        self.unsettled = parts


@dataclass(slots=True)
class Item:
    """One message of a delivery: read or unreadable, settled on its own.

    `alone` is set when the delivery came a second time: it is then tried apart from all others.
    `transport` is the trace context of the delivery itself. `begun` is set once it has been tried here.
    """

    part: Part
    bundle: _Bundle
    alone: bool
    transport: str | None
    settled: bool = False
    begun: bool = False

    @property
    def delivery(self) -> Delivery:
        return self.bundle.delivery


def completed_by(items: Iterable[Item]) -> list[Delivery]:
    """Return the deliveries that have no other unsettled part than `items`."""
    parts: dict[_Bundle, int] = {}
    for item in items:
        parts[item.bundle] = parts.get(item.bundle, 0) + 1
    return [bundle.delivery for bundle, count in parts.items() if bundle.unsettled == count]


async def settle(items: Iterable[Item]) -> None:
    """Say that all that these messages caused is committed; acknowledge the deliveries this completes."""
    for item in items:
        if item.settled:
            continue
        item.settled = True
        item.bundle.unsettled -= 1
        if item.bundle.unsettled == 0:
            await item.delivery.ack()


class Intake:
    """Collects deliveries of one or several queues for one reader."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._items: deque[Item] = deque()
        self._filled = asyncio.Event()

    def deliver(self, delivery: Delivery) -> None:
        """Take a delivery apart; to be used as the bus's callback."""
        self._items.extend(self.read(delivery))
        self._filled.set()

    def read(self, delivery: Delivery) -> list[Item]:
        """Return what a delivery holds, for a caller who does not want it in line."""
        parts = read_body(
            delivery.body,
            content_type=delivery.content_type,
            headers=delivery.headers,
            encoding=delivery.content_encoding,
            limits=self._limits,
        )
        bundle = _Bundle(delivery, len(parts))
        alone = delivery.redelivered
        transport = tracing.current_traceparent()
        return [Item(part, bundle, alone, transport) for part in parts]

    def put_back(self, items: Sequence[Item]) -> None:
        """Take items again that are not settled; they come first."""
        self._items.extendleft(item for item in reversed(items) if not item.settled)
        self._filled.set()

    def take_untouched(self) -> list[Delivery]:
        """Remove the deliveries of which no part was taken or settled, and return them, to be given back."""
        here = Counter(item.bundle for item in self._items)
        untouched = {bundle for bundle, parts in here.items() if parts == bundle.parts}
        self._items = deque(item for item in self._items if item.bundle not in untouched)
        return [bundle.delivery for bundle in here if bundle in untouched]

    def __len__(self) -> int:
        return len(self._items)

    async def take(self, most: int) -> list[Item]:
        """Wait for a message, then return it with all others that are waiting, `most` at most."""
        while not self._items:
            self._filled.clear()
            await self._filled.wait()
        first = self._items.popleft()
        batch = [first]
        while not first.alone and len(batch) < most and self._items and not self._items[0].alone:
            batch.append(self._items.popleft())
        return batch
