"""The flow of one handler's messages: whether its queue is consumed, and whether what was taken may begin."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from events.bus import Bus, Consumer
from events.intake import Intake
from handlers.breaker import Circuit, Phase
from handlers.retries import Parked, Waiting

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
        circuit: the handler's breaker.
        give_back: takes the waiting messages that have not begun.
    """

    def __init__(
        self,
        queue: str,
        intake: Intake,
        *,
        bus: Bus,
        circuit: Circuit | None,
        give_back: Callable[[Sequence[Waiting]], Awaitable[None]],
    ) -> None:
        self._queue = queue
        self._give_back = give_back
        self._intake = intake
        self._bus = bus
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
    def is_free(self) -> bool:
        """Whether any number of messages may begin."""
        return self._open.is_set() and (self._circuit is None or self._circuit.is_closed)

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
            try:
                await self._turn()
            except BaseException:
                self._changed.set()  # it is still to be done when this is started again
                raise

    async def stop(self) -> None:
        """Consume no more."""
        self._open.clear()
        await self._cancel()

    async def until_open(self) -> None:
        """Return when messages may begin, and the bus takes what they cause."""
        await self._open.wait()
        await self._bus.until_writable()

    def sample(self) -> None:
        """Take a message from the queue as the single one that tries."""
        if not self._sampling:
            self._sampling = True
            self._changed.set()

    def admit(self) -> bool:
        """Say whether a message from the queue may begin; while one is to try, that is a single one."""
        return self.is_free or (self._open.is_set() and self.wants_probe)

    def left_over(self) -> None:
        """Something that was taken has not begun: if the flow is off, it goes back."""
        if not self._open.is_set():
            self._changed.set()

    async def _turn(self) -> None:
        if self._may_begin:
            self._open.set()
        else:
            self._open.clear()
        wanted = self._wanted()
        if wanted != self._prefetch:
            await self._cancel()
            if wanted:
                self._consumer = await self._bus.consume(self._queue, self._intake.deliver, prefetch=wanted)
                self._prefetch = wanted
        if not wanted:
            await self._hand_back()

    @property
    def _may_begin(self) -> bool:
        if self._circuit is None or self._circuit.is_closed:
            return not self._paused
        return self.wants_probe and self._sampling

    def _wanted(self) -> int:
        """Return how many deliveries to take at a time."""
        if self._circuit is None or self._circuit.is_closed:
            self._sampling = False
            return 0 if self._paused else _PREFETCH
        self._sampling &= self._circuit.state.phase is Phase.HALF_OPEN
        return 1 if self._sampling and not self._paused else 0

    async def _cancel(self) -> None:
        consumer, self._consumer, self._prefetch = self._consumer, None, 0
        if consumer is not None:
            await consumer.cancel()

    async def _hand_back(self) -> None:
        deliveries = self._intake.take_untouched()
        for delivery in deliveries:
            await delivery.requeue()
        await self._give_back([each.row for each in deliveries if isinstance(each, Parked)])
        if deliveries:
            logger.info(
                "%d deliveries of %s are handed back: its handler does not run for the time being",
                len(deliveries),
                self._queue,
                extra={"action": "handler.handed_back", "queue": self._queue},
            )
