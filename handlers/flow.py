"""The flow of one handler's messages: whether its queue is consumed, and whether what was taken may begin."""

import asyncio
import logging
from collections.abc import Callable
from uuid import UUID

from events.bus import Bus, Consumer
from events.intake import Intake
from handlers.breaker import Circuit, Signal
from handlers.retries import Parked, Retries

logger = logging.getLogger(__name__)

_PREFETCH = 16


class Flow:
    """Turns the consumer of a queue on and off.

    While the handler is paused or its breaker is open nothing is consumed, and what was taken and has not begun
    goes back to its queue: another process may be able to do it.

    Args:
        queue: the name of the queue.
        intake: where its deliveries go.
        bus: what it is on.
        retries: where waiting messages that have not begun go back to.
        circuit: the handler's breaker.
        forget: called with the id of a waiting message that goes back: its lease is not to be renewed.
    """

    def __init__(
        self,
        queue: str,
        intake: Intake,
        *,
        bus: Bus,
        retries: Retries,
        circuit: Circuit | None,
        forget: Callable[[UUID], None],
    ) -> None:
        self._queue = queue
        self._forget = forget
        self._intake = intake
        self._bus = bus
        self._retries = retries
        self._circuit = circuit
        self._paused = False
        self._sampling = False
        self._consumer: Consumer | None = None
        self._prefetch = 0
        self._open = asyncio.Event()
        self._changed = asyncio.Event()
        if circuit is not None:
            circuit.listen(self._changed.set)

    @property
    def paused(self) -> bool:
        """Whether an operator has stopped the handler."""
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        if paused != self._paused:
            self._paused = paused
            self._changed.set()

    @property
    def is_open(self) -> bool:
        """Whether messages may begin."""
        return self._open.is_set()

    @property
    def wants_probe(self) -> bool:
        """Whether a single message shall find out if the dependency is back."""
        return not self._paused and self._circuit is not None and self._circuit.wants_probe

    async def start(self) -> None:
        """Begin to consume, if nothing is against it."""
        await self._turn()

    async def keep(self) -> None:
        """Follow all changes, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._turn()

    async def stop(self) -> None:
        """Consume no more."""
        self._open.clear()
        await self._cancel()

    async def until_open(self) -> None:
        """Return when messages may begin, and the bus takes what they cause."""
        await self._open.wait()
        await self._bus.until_writable()

    def sample(self) -> None:
        """Take a message from the queue as the single one that tries: none waits that could."""
        if not self._sampling:
            self._sampling = True
            self._changed.set()

    def admit(self) -> bool:
        """Say whether a message from the queue may begin; while one is to try, that is a single one."""
        if not self._open.is_set():
            return False
        if self._circuit is None or self._circuit.is_closed:
            return True
        if not self._circuit.wants_probe:
            return False
        self._circuit.tell(Signal.PROBE)
        return True

    def left_over(self) -> None:
        """Something that was taken has not begun: if the flow is off, it goes back."""
        if not self._open.is_set():
            self._changed.set()

    async def _turn(self) -> None:
        wanted = self._wanted()
        if wanted:
            self._open.set()
        else:
            self._open.clear()
        if wanted != self._prefetch:
            await self._cancel()
            if wanted:
                self._consumer = await self._bus.consume(self._queue, self._intake.deliver, prefetch=wanted)
                self._prefetch = wanted
        if not wanted:
            await self._hand_back()

    def _wanted(self) -> int:
        """Return how many deliveries to take at a time."""
        if self._paused:
            return 0
        if self._circuit is None or self._circuit.is_closed:
            self._sampling = False
            return _PREFETCH
        if self._circuit.wants_probe and self._sampling:
            return 1
        self._sampling = False
        return 0

    async def _cancel(self) -> None:
        consumer, self._consumer, self._prefetch = self._consumer, None, 0
        if consumer is not None:
            await consumer.cancel()

    async def _hand_back(self) -> None:
        deliveries = self._intake.take_untouched()
        rows = [each.row for each in deliveries if isinstance(each, Parked)]
        for row in rows:
            self._forget(row.id)
        await self._retries.give_back(rows)
        for delivery in deliveries:
            await delivery.requeue()
        if deliveries:
            logger.info(
                "%d deliveries of %s are handed back: its handler does not run for the time being",
                len(deliveries),
                self._queue,
                extra={"action": "handler.handed_back", "queue": self._queue},
            )
