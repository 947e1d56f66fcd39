"""Dead letters of the coordinator that are replayed: rows that it takes like deliveries."""

from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncEngine

from coordinator.batch import CONSUMER
from events.clock import Clock
from events.database import transaction
from events.ids import Ids
from events.intake import Intake
from handlers.retries import Parked, Retries

_MOST = 100


@dataclass(slots=True)
class _Replay(Parked):
    """A row that is deleted when it is acknowledged: deciding on it twice changes nothing."""

    replays: "Replays | None" = None

    async def ack(self) -> None:
        """See `Delivery.ack`."""
        if self.replays is not None:
            await self.replays.remove(self)
        self.settled.set()


class Replays:
    """Takes the coordinator's rows from the table of messages that are tried again.

    Args:
        engine: the database.
        intake: where they go.
        clock, ids: the ports for time and names.
    """

    def __init__(self, engine: AsyncEngine, intake: Intake, *, clock: Clock, ids: Ids) -> None:
        self._engine = engine
        self._intake = intake
        self._retries = Retries(engine, clock=clock, ids=ids)

    async def take(self) -> int:
        """Take what is due; return how many there were."""
        await self._retries.clock.calibrate_if_old()
        if CONSUMER not in await self._retries.count_due():
            return 0
        rows = await self._retries.claim(CONSUMER, _MOST)
        rows += await self._retries.claim(CONSUMER, _MOST - len(rows), suspects=True)
        for row in rows:
            self._intake.deliver(_Replay(row, replays=self))
        return len(rows)

    async def remove(self, delivery: Parked) -> None:
        """Delete the row of a delivery: what followed from it is committed."""
        async with transaction(self._engine) as connection:
            await self._retries.remove(connection, [delivery.row])
