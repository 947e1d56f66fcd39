"""What the embedded bus keeps of its queues in memory; the messages themselves are rows."""

import contextlib
import logging
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from events.bus import Deliver
from events.codec import BATCH_TYPE

DELIVERY_LIMIT = 20  # the same as on RabbitMQ
LARGEST_PREFETCH = 256  # of one consumer
PAGE = 256  # messages of one queue that memory holds at most, beside those delivered

_log = logging.getLogger(__name__)
_NO_HEADERS: Mapping[str, Any] = MappingProxyType({})


class Keeper(Protocol):
    """What deliveries and consumers need of the bus. `epoch` changes when it closes: deliveries are void then."""

    epoch: int

    async def acknowledge(self, delivery: "EmbeddedDelivery") -> None:
        """Delete the row of `delivery`."""

    def bury(self, delivery: "EmbeddedDelivery") -> None:
        """Move the row of `delivery` to the dead letters."""

    def wake(self) -> None:
        """Look at all queues soon."""


class EmbeddedRow:
    """A stored message in memory."""

    __slots__ = ("body", "failures", "id", "redelivered")

    def __init__(self, row_id: int, body: bytes, *, redelivered: bool) -> None:
        self.id = row_id
        self.body = body
        self.redelivered = redelivered
        self.failures = 0


class EmbeddedQueue:
    """What memory knows of a queue.

    Each committed row with an id up to `cursor` is in memory or settled; `written` is the newest id that a
    transaction, committed or not, has given to this queue. `unread` says that of the rows between the two some will
    not be handed over in memory but must be read from the table. Rows up to `restored` may have been delivered before
    the bus was opened.
    """

    __slots__ = ("consumers", "cursor", "name", "restored", "unread", "waiting", "written")

    def __init__(self, name: str, *, written: int = 0, restored: int = 0) -> None:
        self.name = name
        self.cursor = 0
        self.written = written
        self.restored = restored
        self.unread = written > 0
        self.waiting: deque[EmbeddedRow] = deque()
        self.consumers: deque[EmbeddedConsumer] = deque()

    @property
    def lacks_rows(self) -> bool:
        """Whether a consumer could take more than memory holds, and the table has it."""
        return self.unread and not self.waiting and any(consumer.room > 0 for consumer in self.consumers)

    def take(self, row: EmbeddedRow, previous: int) -> None:
        """Take a row just committed; `previous` is the one written to this queue before it.

        Callers may come here in another order than they committed in, or never: then there is a gap before `row`,
        and it is left to be read from the table. What was read already is not taken twice.
        """
        if row.id <= self.cursor:
            return
        if previous <= self.cursor and self.consumers and len(self.waiting) < PAGE:
            self.waiting.append(row)
            self.cursor = row.id
        else:
            self.unread = True

    def hand_out(self) -> None:
        """Give waiting messages to the consumers in turn, as far as they have room."""
        while self.waiting and (consumer := self._next_with_room()) is not None:
            consumer.hand(self.waiting.popleft())

    def _next_with_room(self) -> "EmbeddedConsumer | None":
        for _ in range(len(self.consumers)):
            consumer = self.consumers[0]
            self.consumers.rotate(-1)
            if consumer.room > 0:
                return consumer
        return None


class EmbeddedDelivery:
    """A message handed to a consumer."""

    __slots__ = ("_settled", "body", "consumer", "content_encoding", "content_type", "headers", "redelivered", "row")

    def __init__(self, row: EmbeddedRow, consumer: "EmbeddedConsumer") -> None:
        self.body = row.body
        self.redelivered = row.redelivered
        self.content_type: str | None = BATCH_TYPE
        self.content_encoding: str | None = None
        self.headers = _NO_HEADERS
        self.consumer = consumer
        self.row = row
        self._settled = False

    @property
    def is_open(self) -> bool:
        """Whether it still holds its row: not settled, and the bus was not closed since."""
        return not self._settled and self.consumer.is_open

    async def ack(self) -> None:
        """See `Delivery.ack`. After `EmbeddedBus.write` has settled it there is nothing left to do."""
        if self.is_open:
            await self.consumer.keeper.acknowledge(self)

    async def requeue(self) -> None:
        """See `Delivery.requeue`."""
        if self.is_open:
            self.give_back()

    def settle(self) -> None:
        """The row has left this consumer; make room for the next. Settling twice is fine."""
        if not self._settled:
            self._settled = True
            self.consumer.room += 1

    def give_back(self) -> None:
        """Put the message first in line again."""
        self.settle()
        self.row.redelivered = True
        self.consumer.queue.waiting.appendleft(self.row)
        self.consumer.keeper.wake()


class EmbeddedConsumer:
    """A running consumer; `room` is how many more messages it may hold."""

    __slots__ = ("_deliver", "_epoch", "keeper", "queue", "room")

    def __init__(self, keeper: Keeper, queue: EmbeddedQueue, deliver: Deliver, *, prefetch: int) -> None:
        self.keeper = keeper
        self.queue = queue
        self.room = min(prefetch, LARGEST_PREFETCH)
        self._epoch = keeper.epoch
        self._deliver = deliver

    @property
    def is_open(self) -> bool:
        """Whether the bus was not closed since this consumer began."""
        return self._epoch == self.keeper.epoch

    def hand(self, row: EmbeddedRow) -> None:
        """Deliver `row`; there is room."""
        self.room -= 1
        delivery = EmbeddedDelivery(row, self)
        try:
            self._deliver(delivery)
        except Exception:  # noqa: BLE001  # not ours: whatever it is, the message must not be lost
            row.failures += 1
            _log.exception(
                "a message of queue %s could not be taken and is given back",
                self.queue.name,
                extra={"action": "bus.deliver_failed", "queue": self.queue.name, "failures": row.failures},
            )
            if row.failures < DELIVERY_LIMIT:
                delivery.give_back()
            else:
                self.keeper.bury(delivery)

    async def cancel(self) -> None:
        """See `Consumer.cancel`."""
        with contextlib.suppress(ValueError):  # cancelled before
            self.queue.consumers.remove(self)
