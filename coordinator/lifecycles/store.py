"""Where entities, their audit trail and delegations are kept: the same statements on PostgreSQL and SQLite."""

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import groupby
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Row, Select, and_, or_, select, tuple_, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.lifecycles.chain import COLUMNS, audit_row, broken
from coordinator.lifecycles.entity import Delegation, Entity, Moved, Signature
from coordinator.lifecycles.tables import lifecycle_delegation, lifecycle_entity, lifecycle_history
from events.bulk import Bulk
from events.clock import Clock
from events.database import reader
from events.service import is_cancelled
from events.storeclock import StoreClock

_ENTITY = tuple(column.name for column in lifecycle_entity.c)
_FIXED = ("lifecycle", "version", "key", "created_at", "correlation_id")
_CHANGING = tuple(name for name in _ENTITY if name not in _FIXED)
_insert = Bulk(lifecycle_entity, *_ENTITY)
_update = Bulk(lifecycle_entity, *_CHANGING)
_record = Bulk(lifecycle_history, *COLUMNS, "hash")

_PAGE = 500


class LifecycleStore:
    """The entities of one database."""

    def __init__(self, engine: AsyncEngine, clock: Clock) -> None:
        self.engine = engine
        self.clock = StoreClock(engine, clock)
        self._reader = reader(engine)

    # Within a transaction

    async def load(self, connection: AsyncConnection, lifecycle: str, key: str) -> Entity | None:
        """Return an entity, locked until the end of the transaction; None if there is none."""
        query = _entities().where(lifecycle_entity.c.lifecycle == lifecycle, lifecycle_entity.c.key == key)
        row = (await connection.execute(query.with_for_update())).first()
        return None if row is None else _entity(row)

    async def insert(self, connection: AsyncConnection, moved: Moved) -> Entity | None:
        """Insert a new entity with its first audit entry, and return it; None if its key is taken.

        Who loses the race for a key waits here for the winner's commit, and has written nothing.
        """
        row = audit_row(moved)
        written = replace(moved.entity, head=row[-1])
        if not await _insert.insert_new(connection, [_values(written, _ENTITY)], key=("lifecycle", "key")):
            return None
        await _record.insert(connection, [row])
        return written

    async def update(self, connection: AsyncConnection, moved: Sequence[Moved]) -> list[Entity]:
        """Write entities that have moved, each with its audit entry, and return them.

        Raises:
            StaleRowError: one of them was changed meanwhile; nothing may be committed.
        """
        rows = [audit_row(each) for each in moved]
        written = [replace(each.entity, head=row[-1]) for each, row in zip(moved, rows, strict=True)]
        expected = ("revision", [each.revision - 1 for each in written])
        await _update.update(connection, [_values(each, _CHANGING) for each in written], key="id", expected=expected)
        await _record.insert(connection, rows)
        return written

    async def claim_due(self, connection: AsyncConnection, known: Iterable[tuple[str, int]], most: int) -> list[Entity]:
        """Return entities whose deadline has passed on the database's clock, locked; others skip them.

        `known` are the names and versions of the life cycles that the caller has the code of.
        """
        query = (
            _entities()
            .where(lifecycle_entity.c.due_at <= self.clock.now())
            .where(tuple_(lifecycle_entity.c.lifecycle, lifecycle_entity.c.version).in_(list(known)))
            .order_by(lifecycle_entity.c.due_at)
            .limit(most)
            .with_for_update(skip_locked=True)
        )
        return [_entity(row) for row in await connection.execute(query)]

    async def delegations_at(self, connection: AsyncConnection, at: datetime) -> list[Delegation]:
        """Return all delegations that hold at a time, to whomever: how a name is spelt is not for the database."""
        d = lifecycle_delegation.c
        query = select(lifecycle_delegation).where(d.starts_at <= at, d.ends_at > at)
        query = query.where(or_(d.revoked_at.is_(None), d.revoked_at > at))
        return [_delegation(row) for row in await connection.execute(query)]

    async def add_delegation(self, connection: AsyncConnection, delegation: Delegation) -> None:
        """Insert a delegation."""
        values = {name: getattr(delegation, name) for name in Delegation.__slots__}
        await connection.execute(lifecycle_delegation.insert().values(**values))

    async def load_delegation(self, connection: AsyncConnection, id: UUID) -> Delegation | None:
        """Return a delegation, locked until the end of the transaction; None if there is none."""
        query = select(lifecycle_delegation).where(lifecycle_delegation.c.id == id).with_for_update()
        row = (await connection.execute(query)).first()
        return None if row is None else _delegation(row)

    async def revoke(self, connection: AsyncConnection, id: UUID, *, by: str, at: datetime) -> None:
        """Mark a delegation as taken back."""
        this = lifecycle_delegation.c.id == id
        await connection.execute(update(lifecycle_delegation).where(this).values(revoked_at=at, revoked_by=by))

    # Reading

    async def find(self, lifecycle: str, key: str) -> Entity | None:
        """Return an entity; None if there is none."""
        query = _entities().where(lifecycle_entity.c.lifecycle == lifecycle, lifecycle_entity.c.key == key)
        found = await self._read(query)
        return _entity(found[0]) if found else None

    async def list(
        self, *, lifecycle: str | None = None, state: str | None = None, limit: int = 50
    ) -> Sequence[Entity]:
        """Return the newest entities, those of a life cycle or in a state only if one is given."""
        query = _entities().order_by(lifecycle_entity.c.id.desc()).limit(limit)
        if lifecycle is not None:
            query = query.where(lifecycle_entity.c.lifecycle == lifecycle)
        if state is not None:
            query = query.where(lifecycle_entity.c.state == state)
        return [_entity(row) for row in await self._read(query)]

    async def waiting(
        self, states: Iterable[tuple[str, int, str]], names: Iterable[str], limit: int = 50
    ) -> Sequence[Entity]:
        """Return entities in one of the states of a version, or escalated to one of `names`, longest there first."""
        c = lifecycle_entity.c
        query = _entities().where(
            or_(tuple_(c.lifecycle, c.version, c.state).in_(list(states)), c.escalated_to.in_(list(names)))
        )
        return [_entity(row) for row in await self._read(query.order_by(c.entered_at, c.id).limit(limit))]

    async def history(self, entity_id: UUID) -> Sequence[Row[Any]]:
        """Return what has happened to an entity, oldest first."""
        h = lifecycle_history.c
        return await self._read(select(lifecycle_history).where(h.entity_id == entity_id).order_by(h.revision))

    async def audit(
        self,
        *,
        lifecycle: str | None = None,
        key: str | None = None,
        user: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 50,
    ) -> Sequence[Row[Any]]:
        """Return the audit trail, newest first, with life cycle and key; `user` has acted or was acted for."""
        h, e = lifecycle_history.c, lifecycle_entity.c
        among: list[ColumnElement[bool]] = []
        among += [e.lifecycle == lifecycle] if lifecycle is not None else []
        among += [e.key == key] if key is not None else []
        among += [or_(h.actor == user, h.acting_for == user)] if user is not None else []
        among += [h.at >= since] if since is not None else []
        among += [h.at < until] if until is not None else []
        query = (
            select(e.lifecycle, e.key, lifecycle_history)
            .join_from(lifecycle_history, lifecycle_entity, h.entity_id == e.id)
            .where(and_(True, *among))
            .order_by(h.at.desc(), h.entity_id.desc(), h.revision.desc())
            .limit(limit)
        )
        return await self._read(query)

    async def verify(
        self, *, lifecycle: str | None = None, key: str | None = None
    ) -> AsyncIterator[tuple[str, str, str | None]]:
        """Return all entities, or those meant, by life cycle and key, each with what is wrong with it, if any."""
        e = lifecycle_entity.c
        meant = select(e.id, e.lifecycle, e.key).order_by(e.id).limit(_PAGE)
        meant = meant if lifecycle is None else meant.where(e.lifecycle == lifecycle)
        meant = meant if key is None else meant.where(e.key == key)
        page = await self._read(meant)
        while page:
            problems = await self._problems([row.id for row in page])
            for row in page:
                yield row.lifecycle, row.key, problems[row.id]
            page = await self._read(meant.where(e.id > page[-1].id))

    async def _problems(self, ids: Sequence[UUID]) -> dict[UUID, str | None]:
        """Say what is wrong with entities; one that cannot be read hides no other."""
        try:
            return await self._compare(ids)
        except Exception as error:
            if is_cancelled() or isinstance(error, DBAPIError):
                raise
            if len(ids) == 1:
                return {ids[0]: f"what is stored of it cannot be read: {error!r}"}
        return {identity: problem for each in ids for identity, problem in (await self._problems([each])).items()}

    async def _compare(self, ids: Sequence[UUID]) -> dict[UUID, str | None]:
        """Compare entities with their entries, all read in one statement: who acts meanwhile changes both or none."""
        e, h = lifecycle_entity.c, lifecycle_history.c
        both = select(lifecycle_entity, lifecycle_history).outerjoin_from(
            lifecycle_entity, lifecycle_history, h.entity_id == e.id
        )
        rows = await self._read(both.where(e.id.in_(ids)).order_by(e.id, h.revision))
        found: dict[UUID, str | None] = {}
        for identity, group in groupby((row._mapping for row in rows), key=lambda row: row[e.id]):  # noqa: SLF001  # SQLAlchemy's name for it is public
            entries = list(group)
            entity = _entity_of({name: entries[0][e[name]] for name in Entity.__slots__})
            trail = [{column.name: each[column] for column in h} for each in entries]
            found[identity] = broken(entity, trail if trail[0]["revision"] is not None else [])
        return found

    async def lost(self) -> Sequence[UUID]:
        """Return the ids of entities that are gone, and whose audit trail is there."""
        h = lifecycle_history.c
        left = select(h.entity_id).distinct().where(h.entity_id.not_in(select(lifecycle_entity.c.id)))
        return [row.entity_id for row in await self._read(left.order_by(h.entity_id))]

    async def delegations(self, *, user: str | None = None, limit: int = 50) -> Sequence[Delegation]:
        """Return the newest delegations, those from or to a person only if one is given."""
        d = lifecycle_delegation.c
        query = select(lifecycle_delegation).order_by(d.id.desc()).limit(limit)
        if user is not None:
            query = query.where(or_(d.from_user == user, d.to_user == user))
        return [_delegation(row) for row in await self._read(query)]

    async def _read(self, query: Select[Any]) -> Sequence[Row[Any]]:
        async with self._reader.connect() as connection:
            rows: Sequence[Row[Any]] = (await connection.execute(query)).all()
        return rows


def _entities() -> Select[Any]:
    return select(lifecycle_entity)


def _values(entity: Entity, names: Iterable[str]) -> tuple[Any, ...]:
    return tuple(getattr(entity, name) for name in names)


def _entity(row: Row[Any]) -> Entity:
    return _entity_of({name: getattr(row, name) for name in Entity.__slots__})


def _entity_of(values: dict[str, Any]) -> Entity:
    signed = {name: _signed(values[name]) for name in ("votes", "signatures")}
    return Entity(**{**values, **signed})


def _signed(stored: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, list[Signature]]:
    return {name: [(user, acting_for) for user, acting_for in signatures] for name, signatures in stored.items()}


def _delegation(row: Row[Any]) -> Delegation:
    return Delegation(**{name: getattr(row, name) for name in Delegation.__slots__})
