"""Writes what a batch amounts to, whoever has decided on it: one statement for each kind of row, or one for all."""

import asyncio
from collections.abc import Iterable, Sequence
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.batch import Batch, Ports
from coordinator.facts import Facts
from coordinator.instance import Instance
from coordinator.items import Items
from coordinator.lines import Lines
from coordinator.replays import Replays
from coordinator.sagas import CONSUMER, Sagas
from coordinator.store import Store
from coordinator.waiting import Waiters
from events.database import transaction
from events.dead_letters import bury
from events.intake import Item, completed_by
from events.outbox import AfterCommit, Outbox

_MOST_MATCHES = 10_000  # nobody looks where an operator acts on many: the sweeps of others do


class Writer:
    """What the engine, its deadlines and its early events write with.

    Attributes:
        goes_on: set when an instance that was written has more to do at once.
        matches: what instances have begun to wait for, and what was parked, as correlations that may match by now.
        may_match: set when there are some.
        line_left: whether a saga that waits for its business key was left for a sweep.

    Args:
        sagas, ports: what batches are decided with.
        engine: the database.
        store, items, waiters, lines, replays, outbox: its tables.
    """

    def __init__(
        self,
        sagas: Sagas,
        ports: Ports,
        *,
        engine: AsyncEngine,
        store: Store,
        items: Items,
        waiters: Waiters,
        lines: Lines,
        replays: Replays,
        outbox: Outbox,
    ) -> None:
        self._sagas = sagas
        self._ports = ports
        self._engine = engine
        self._store = store
        self._items = items
        self._waiters = waiters
        self._lines = lines
        self._replays = replays
        self._outbox = outbox
        self.goes_on = asyncio.Event()
        self.matches: set[UUID] = set()
        self.may_match = asyncio.Event()
        self.line_left = False

    def batch(self, facts: Facts) -> Batch:
        """Return an empty batch, to be decided on with these facts."""
        return Batch(self._sagas, self._ports, facts)

    async def settle_lines(
        self, connection: AsyncConnection, batch: Batch, keys: Iterable[str] = (), *, grant: bool = True
    ) -> None:
        """Start who is next for a business key, in the transaction in which the one before ends."""
        if not self._sagas.with_lock:
            return
        batch.admit(instance for instance in batch.fresh if instance.id in batch.joining)
        left = await self._lines.settle(connection, batch, keys, grant=grant)
        self.line_left = self.line_left or left

    async def write(self, connection: AsyncConnection, batch: Batch, items: Sequence[Item] = ()) -> AfterCommit:
        """Write changed instances, history, dead letters and outbox; `items` are done with.

        May stand in a block of `together`. New instances have been inserted before.

        Raises:
            StaleRowError: an instance was changed meanwhile.
        """
        await self._store.update(connection, batch.changed, batch.loaded)
        await self._store.record(connection, batch.history)
        await self._items.write(connection, [*batch.fresh, *batch.changed], batch.loaded)
        await self._waiters.write(
            connection,
            begun=list(batch.begun.values()),
            over=batch.over,
            parked=batch.parked,
            taken=batch.taken,
            consumer=CONSUMER,
            now=self._store.clock.now(),
        )
        if batch.letters:
            await bury(connection, batch.letters, ids=self._ports.ids, now=self._store.clock.now())
        await self._replays.remove(connection, items)
        await self._replays.hold(connection, batch.held)
        messages = [message for _, message in batch.messages]
        hand_over = await self._outbox.write(connection, messages, completed_by(items))

        def after_commit() -> None:
            hand_over()
            batch.log()
            now = self._store.clock.now()
            if any(each.wants_more_by(now) for each in (*batch.fresh, *batch.changed)):
                self.goes_on.set()
            matches = [*batch.begun_for, *(each.correlation.id for each in batch.parked)]
            if matches and len(self.matches) < _MOST_MATCHES:
                self.matches.update(matches)
                self.may_match.set()

        return after_commit

    async def give_up(self, instance: Instance, reason: str) -> None:
        """Leave an instance to a person, unless it has moved since."""
        async with transaction(self._engine) as connection:
            loaded = await self._store.load(connection, [instance.id])
            batch = self.batch(Facts(loaded))
            if loaded[instance.id].revision == instance.revision:
                batch.stop(loaded[instance.id], reason)
            after_commit = await self.write(connection, batch)
        after_commit()
