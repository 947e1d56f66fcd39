"""Messages that the broker itself has given up on: they are kept in the table like all others."""

import logging
from collections.abc import Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from events.bus import DEAD_LETTERS, Bus, Consumer
from events.clock import Clock
from events.codec import Limits
from events.database import is_transient, transaction
from events.dead_letters import BROKER_REASONS, BUS, COORDINATOR, DeadLetter, bury
from events.ids import Ids
from events.intake import Intake, Item, completed_by, settle
from events.outbox import Outbox
from events.service import Supervisor, is_cancelled

logger = logging.getLogger(__name__)

_BATCH = 100
_PREFETCH = 16
_PAUSE = 1.0


class BrokerLetters:
    """Takes the queue of the broker's dead letters.

    Args:
        engine: where they are kept.
        bus: where the queue is.
        outbox: on the embedded bus it removes them from the queue in the same commit.
        clock, ids: the ports for time and names.
        limits: the largest message that is taken apart.
    """

    def __init__(
        self, engine: AsyncEngine, *, bus: Bus, outbox: Outbox, clock: Clock, ids: Ids, limits: Limits
    ) -> None:
        self._engine = engine
        self._bus = bus
        self._outbox = outbox
        self._clock = clock
        self._ids = ids
        self._intake = Intake(limits)
        self._supervisor = Supervisor(clock)
        self._consumer: Consumer | None = None

    @property
    def failing(self) -> frozenset[str]:
        """The names of its background tasks that have failed and wait to be started again."""
        return self._supervisor.failing

    async def start(self) -> None:
        """Start to take them."""
        self._supervisor.start("dead_letters.take", self._take_loop)
        self._consumer = await self._bus.consume(DEAD_LETTERS, self._intake.deliver, prefetch=_PREFETCH)

    async def stop(self) -> None:
        """Stop; what is not kept yet stays in the queue."""
        if self._consumer is not None:
            await self._consumer.cancel()
        await self._supervisor.stop()

    async def _take_loop(self) -> None:
        while True:
            items = await self._intake.take(_BATCH)
            try:
                await self._keep(items)
            except Exception as error:
                self._intake.put_back(items)
                if is_cancelled() or not is_transient(error):
                    raise
                logger.warning("dead letters wait for the database: %s", error, extra={"action": "dead_letters.wait"})
                await self._clock.sleep(_PAUSE)

    async def _keep(self, items: Sequence[Item]) -> None:
        letters = [_letter(item) for item in items]
        async with transaction(self._engine) as connection:
            await bury(connection, letters, ids=self._ids, now=self._clock.now())
            after_commit = await self._outbox.write(connection, [], completed_by(items))
        after_commit()
        await settle(items)
        for letter in letters:
            logger.error(
                "the broker has given up on a message of %s: %s",
                letter.consumer,
                letter.reason,
                extra={"action": "dead_letters.from_broker", "consumer": letter.consumer, "reason": letter.reason},
            )


def _letter(item: Item) -> DeadLetter:
    headers = item.delivery.headers
    said = _text(headers.get("x-first-death-reason")) or "delivery_limit"
    queue = _text(headers.get("x-first-death-queue"))
    detail = f"the broker gave it up: {said}" + (f" in queue {queue}" if queue else "")
    reason = said if said in BROKER_REASONS else "rejected"  # anybody can send such a header
    return DeadLetter(item, _consumer(queue), reason, detail, attempts=0)


def _consumer(queue: str) -> str:
    """Return who the queue belongs to, by its name: NAMESPACE.handler.NAME, NAMESPACE.coordinator.KIND."""
    _, _, part = queue.partition(".")
    if part.startswith("handler."):
        return part.removeprefix("handler.")
    return COORDINATOR if part.startswith("coordinator.") else queue or BUS


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")
