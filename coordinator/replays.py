"""Rows that the coordinator takes like deliveries: replayed dead letters, and replies that others have held for it."""

from collections.abc import Iterable, Sequence
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.instance import Instance
from coordinator.sagas import CONSUMER, SagaKey, holding
from events.clock import Clock
from events.ids import Ids
from events.intake import Intake, Item
from handlers.retries import Parked, Retries, Waiting, row_of
from handlers.tables import retry

_MOST = 100


class Replays:
    """Takes the coordinator's rows from the table of messages that are tried again.

    Args:
        engine: the database.
        intake: where they go.
        known: the names and versions of the sagas that replies are taken for.
        clock, ids: the ports for time and names.
    """

    def __init__(
        self, engine: AsyncEngine, intake: Intake, known: Iterable[SagaKey], *, clock: Clock, ids: Ids
    ) -> None:
        self._intake = intake
        self._retries = Retries(engine, clock=clock, ids=ids)
        self._consumers = [CONSUMER, *(holding(*key) for key in known)]
        self._given: list[Parked] = []

    async def take(self) -> int:
        """Take what is due, unless some of it is still in work; return how many there were."""
        if any(not parked.settled.is_set() for parked in self._given):  # they would be taken again with each lease
            return 0
        await self._retries.clock.calibrate_if_old()
        due = await self._retries.count_due()
        rows: list[Waiting] = []
        for consumer in self._consumers:
            if consumer in due:
                rows += await self._retries.claim(consumer, _MOST - len(rows))
                rows += await self._retries.claim(consumer, _MOST - len(rows), suspects=True)
        self._given = [Parked(row) for row in rows]
        for parked in self._given:
            self._intake.deliver(parked)
        return len(rows)

    async def remove(self, connection: AsyncConnection, items: Iterable[Item]) -> None:
        """Delete the rows that `items` came from, in the commit of what follows. May stand in a block of `together`."""
        await self._retries.remove(connection, [row for item in items if (row := row_of(item)) is not None])

    async def hold(self, connection: AsyncConnection, rows: Sequence[Waiting]) -> None:
        """Keep replies for who has the version that they are for. May stand in a block of `together`."""
        await self._retries.add(connection, rows)

    async def readdress(self, connection: AsyncConnection, sagas: Iterable[Instance], version: int) -> None:
        """Hold replies that are held for versions which these instances have had until now for another one."""
        ids: dict[tuple[str, str], list[UUID]] = {}
        for instance in sagas:
            old, new = holding(instance.saga, instance.version), holding(instance.saga, version)
            ids.setdefault((old, new), []).append(instance.id)
        for (old, new), of in ids.items():
            held = retry.update().where(retry.c.consumer == old, retry.c.saga_id.in_(of))
            await connection.execute(held.values(consumer=new))
