"""Sagas that wait for a business key: one holds it, the others stand in line behind it, in the order of their arrival.

The holder is who stands first. Whoever changes a line locks its key, to the end of the transaction, and that is the
transaction which starts or ends the saga: so a line has no gap, and no holder that has ended.

Instances are locked before keys. Who holds a key waits for no instance any more: one that somebody else has locked is
left for `stalled`. So no two transactions wait for each other.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from uuid import UUID

from pydantic_core import to_json
from sqlalchemy import ARRAY, Text, Uuid, and_, bindparam, column, delete, or_, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.batch import Batch
from coordinator.instance import Status
from coordinator.store import Store
from coordinator.tables import saga_instance, saga_lock
from events.bulk import Bulk, delete_by
from events.database import reader

_join = Bulk(saga_lock, "key", "saga_id")
_MOST = 100  # of one line that end as soon as they begin, in one transaction; the sweep goes on with the rest
_ENDED = tuple(each.value for each in Status if each.ended)

# In the order of the keys, which is the same for everybody: two transactions never wait for each other's lines.
_lock = text("SELECT pg_advisory_xact_lock(hashtextextended(key, 5)) FROM unnest(:keys) AS given (key)").bindparams(
    bindparam("keys", type_=ARRAY(Text))
)
_heads = (
    "SELECT id FROM saga_instance WHERE status = 'waiting' AND id IN (SELECT"
    " (SELECT saga_id FROM saga_lock WHERE saga_lock.key = given.key ORDER BY position LIMIT 1) FROM {given})"
)
_heads_postgresql = (
    text(_heads.format(given="unnest(:keys) AS given (key)"))
    .bindparams(bindparam("keys", type_=ARRAY(Text)))
    .columns(column("id", Uuid))
)
_heads_sqlite = text(_heads.format(given="(SELECT value AS key FROM json_each(:keys)) AS given")).columns(
    column("id", Uuid)
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a saga stands in the line for its business key; `behind` is 0 for who holds it."""

    key: str
    behind: int


class Lines:
    """The lines of one database."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reader = reader(store.engine)

    async def settle(
        self, connection: AsyncConnection, batch: Batch, keys: Iterable[str] = (), *, grant: bool = True
    ) -> bool:
        """Let new sagas of a batch join their lines and ended ones leave them; start who is first now.

        New instances must have been inserted. The lines of `keys` are looked at as well. Without `grant` nobody is
        started. Return whether somebody was left for `stalled`.
        """
        leaving = batch.leaving
        concerned = {*keys, *batch.joining.values(), *await self._keys_of(connection, leaving)}
        if not concerned:
            return False
        ordered = sorted(concerned)
        if connection.dialect.name == "postgresql":  # SQLite's only writer holds everything locked
            await connection.execute(_lock, {"keys": ordered})
        await delete_by(connection, saga_lock, "saga_id", leaving)
        await _join.insert(connection, [(key, saga_id) for saga_id, key in batch.joining.items()])
        if not grant:
            return True
        for _ in range(_MOST):
            heads = await self._heads(connection, ordered)
            ended = await self._grant(connection, batch, heads)
            if not ended:
                return any(batch.awaits_turn(saga_id) for saga_id in heads)
            await delete_by(connection, saga_lock, "saga_id", ended)
        return True

    async def stalled(self, known: Collection[tuple[str, int]], most: int) -> list[str]:
        """Return keys whose holder waits although it is first, or has ended: somebody died, or lacked its version."""
        earlier, columns = saga_lock.alias(), saga_instance.c
        may_begin = and_(columns.status == Status.WAITING.value, tuple_(columns.saga, columns.version).in_(list(known)))
        query = (
            select(saga_lock.c.key)
            .join(saga_instance, saga_instance.c.id == saga_lock.c.saga_id)
            .where(or_(saga_instance.c.status.in_(_ENDED), may_begin))
            .where(
                ~select(earlier.c.position)
                .where(earlier.c.key == saga_lock.c.key, earlier.c.position < saga_lock.c.position)
                .exists()
            )
            .limit(most)
        )
        async with self._reader.connect() as connection:
            return list((await connection.execute(query)).scalars())

    async def clear(self, connection: AsyncConnection, keys: Collection[str]) -> None:
        """Take those out of the lines of `keys` who have ended."""
        ended = select(saga_instance.c.id).where(saga_instance.c.status.in_(_ENDED))
        await connection.execute(delete(saga_lock).where(saga_lock.c.key.in_(keys), saga_lock.c.saga_id.in_(ended)))

    async def place(self, saga_id: UUID) -> Place | None:
        """Return where a saga stands; None if it stands in no line."""
        mine = select(saga_lock.c.key, saga_lock.c.position).where(saga_lock.c.saga_id == saga_id)
        async with self._reader.connect() as connection:
            found = (await connection.execute(mine)).first()
            if found is None:
                return None
            before = select(saga_lock.c.saga_id).where(
                saga_lock.c.key == found.key, saga_lock.c.position < found.position
            )
            return Place(found.key, len((await connection.execute(before)).all()))

    async def _keys_of(self, connection: AsyncConnection, sagas: Collection[UUID]) -> Iterable[str]:
        if not sagas:
            return ()
        return (await connection.execute(select(saga_lock.c.key).where(saga_lock.c.saga_id.in_(sagas)))).scalars()

    async def _heads(self, connection: AsyncConnection, keys: list[str]) -> list[UUID]:
        """Return who is first in the lines of `keys` and waits."""
        if connection.dialect.name == "postgresql":
            found = await connection.execute(_heads_postgresql, {"keys": keys})
        else:
            found = await connection.execute(_heads_sqlite, {"keys": to_json(keys).decode()})
        return list(found.scalars())

    async def _grant(self, connection: AsyncConnection, batch: Batch, heads: list[UUID]) -> list[UUID]:
        """Start `heads`, unless somebody else has locked them; return who has ended thereby."""
        if strange := [saga_id for saga_id in heads if saga_id not in batch.current]:
            batch.admit(await self._store.claim_waiting(connection, strange))
        for saga_id in heads:
            if saga_id in batch.current:
                batch.grant(saga_id)
        return [saga_id for saga_id in batch.leaving if saga_id in heads]
