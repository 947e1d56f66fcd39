"""Where instances and their history are kept: the same statements on PostgreSQL and SQLite, a batch at a time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, Select, bindparam, func, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.chain import COLUMNS, HistoryRow
from coordinator.instance import Instance, Origin, Status, StepState, StepStatus, item_name, step_and_item
from coordinator.search import Query
from coordinator.tables import IN_FLIGHT, saga_history, saga_instance, saga_item
from events.bulk import Bulk, Lookup
from events.clock import Clock
from events.database import reader
from events.storeclock import StoreClock

_COLUMNS = (
    "id",
    "saga",
    "version",
    "key",
    "status",
    "state",
    "steps",
    "revision",
    "due_at",
    "reason",
    "traceparent",
    "created_at",
    "updated_at",
    "deadline",
    "head",
    "turned_back",
    "origin",
    "announced",
)
_FIXED = ("saga", "version", "key", "traceparent", "created_at")
_insert = Bulk(saga_instance, *_COLUMNS)
_update = Bulk(saga_instance, *(name for name in _COLUMNS if name not in _FIXED))
_pin = Bulk(saga_instance, "id", "version")
_load = Lookup(saga_instance, *_COLUMNS, key="id")
_load_locked = Lookup(saga_instance, *_COLUMNS, key="id", lock=True)
_record = Bulk(saga_history, *COLUMNS, "hash")


class Store:
    """The saga instances of one database."""

    def __init__(self, engine: AsyncEngine, clock: Clock) -> None:
        self.engine = engine
        self._reader = reader(engine)
        self.clock = StoreClock(engine, clock)

    # Within a transaction

    async def load(
        self, connection: AsyncConnection, ids: Sequence[UUID], *, lock: bool = True
    ) -> dict[UUID, Instance]:
        """Return the instances of `ids`; locked until the end of the transaction, in one order for everybody."""
        lookup = _load_locked if lock else _load
        return {row[0]: _instance(row) for row in await lookup.find(connection, ids)}

    async def insert(self, connection: AsyncConnection, instances: Sequence[Instance]) -> None:
        """Insert instances; a business key that is there already is an error. May stand in `together`."""
        await _insert.insert(connection, _rows(instances))

    async def insert_new(self, connection: AsyncConnection, instances: Sequence[Instance]) -> set[UUID]:
        """Insert instances whose business key is new; return the ids of those.

        Who loses the race for a key waits here for the winner's commit; its instance is then missing in the
        answer, and its start was a duplicate.
        """
        if not instances:
            return set()
        return set(await _insert.insert_new(connection, _rows(instances), key=("saga", "key")))

    async def update(
        self, connection: AsyncConnection, instances: Sequence[Instance], loaded: Mapping[UUID, Instance]
    ) -> None:
        """Write instances over those that were `loaded` in this transaction.

        Raises:
            StaleRowError: one of them has moved on; nothing may be committed.
        """
        rows = [
            (
                i.id,
                i.status.value,
                i.state,
                _steps(i),
                i.revision,
                i.due_at,
                i.reason,
                i.updated_at,
                i.deadline,
                i.head,
                i.turned_back,
                i.origin and i.origin.to_json(),
                i.announced and i.announced.value,
            )
            for i in instances
        ]
        expected = ("revision", [loaded[instance.id].revision for instance in instances])
        await _update.update(connection, rows, key="id", expected=expected)

    async def pin(self, connection: AsyncConnection, instances: Sequence[Instance]) -> None:
        """Write which versions instances have that are loaded and locked. Not in `together` with their update."""
        await _pin.update(connection, [(i.id, i.version) for i in instances], key="id")

    async def record(self, connection: AsyncConnection, rows: Sequence[HistoryRow]) -> None:
        """Append history rows."""
        await _record.insert(connection, rows)

    async def claim_due(
        self,
        connection: AsyncConnection,
        known: Iterable[tuple[str, int]],
        most: int,
        *,
        now: datetime,
        items: bool = True,
    ) -> dict[UUID, Instance]:
        """Return instances whose deadline, or with `items` that of an item, has passed by `now`.

        They are locked, and others skip them. `known` are the names and versions of the sagas that the caller has the
        code of.
        """
        is_known = tuple_(saga_instance.c.saga, saga_instance.c.version).in_(list(known))
        own = _select().where(saga_instance.c.due_at <= now).order_by(saga_instance.c.due_at)
        overdue = (
            select(saga_item.c.saga_id)
            .join(saga_instance, saga_instance.c.id == saga_item.c.saga_id)
            .where(saga_item.c.due_at <= now, text(f"saga_instance.{IN_FLIGHT}"), is_known)
            .order_by(saga_item.c.due_at)
            .limit(most)
        )
        of_items = _select().where(saga_instance.c.id.in_(overdue))
        due: dict[UUID, Instance] = {}
        for query in (own, of_items) if items else (own,):
            query = query.where(is_known).limit(most - len(due)).with_for_update(skip_locked=True)  # noqa: PLW2901
            due |= {row.id: _instance(row) for row in await connection.execute(query)}
            if len(due) >= most:
                break
        return due

    async def claim_waiting(self, connection: AsyncConnection, ids: Sequence[UUID]) -> list[Instance]:
        """Return those of `ids` that wait for their turn, locked; others skip them, and this skips those of others."""
        wanted = _select().where(saga_instance.c.id.in_(ids), saga_instance.c.status == Status.WAITING.value)
        return [_instance(row) for row in await connection.execute(wanted.with_for_update(skip_locked=True))]

    # Reading

    async def find(self, reference: str) -> list[Instance]:
        """Return the instances with this id or this business key."""
        try:
            where = saga_instance.c.id == UUID(reference)
        except ValueError:
            where = saga_instance.c.key == reference
        else:
            where = where | (saga_instance.c.key == reference)
        return [_instance(row) for row in await self._read(_select().where(where))]

    async def list(
        self, query: Query | None = None, *, limit: int = 50, after: UUID | None = None
    ) -> Sequence[Instance]:
        """Return the instances that are meant, newest first: the first `limit`, or those that follow `after`."""
        wanted = _select().where((query or Query()).condition()).order_by(saga_instance.c.id.desc()).limit(limit)
        if after is not None:
            wanted = wanted.where(saga_instance.c.id < after)
        return [_instance(row) for row in await self._read(wanted)]

    async def page(self, query: Query, *, after: UUID, limit: int) -> Sequence[Instance]:
        """Return the instances that are meant and that follow `after`, oldest first, `limit` at most."""
        wanted = _select().where(query.condition(), saga_instance.c.id > after)
        return [_instance(row) for row in await self._read(wanted.order_by(saga_instance.c.id).limit(limit))]

    async def due(self, query: Query, *, after: tuple[datetime, UUID] | None = None, limit: int) -> Sequence[Instance]:
        """Return the instances that are meant and have a deadline, the earliest first, those that follow `after`."""
        columns = saga_instance.c.due_at, saga_instance.c.id
        wanted = _select().where(query.condition(), saga_instance.c.due_at.is_not(None))
        if after is not None:
            values = (bindparam(None, value, column.type) for value, column in zip(after, columns, strict=True))
            wanted = wanted.where(tuple_(*columns) > tuple_(*values))
        return [_instance(row) for row in await self._read(wanted.order_by(*columns).limit(limit))]

    async def open_items(self, saga_id: UUID, limit: int = 50) -> dict[str, StepState]:
        """Return items of an instance's fan-outs that have failed or are under way, `limit` of them at most."""
        over = [StepStatus.LISTED.value, StepStatus.SUCCEEDED.value, StepStatus.UNDONE.value]
        query = select(saga_item.c.step, saga_item.c.number, saga_item.c.state)
        query = query.where(saga_item.c.saga_id == saga_id, saga_item.c.status.not_in(over))
        order = (saga_item.c.due_at.is_not(None), saga_item.c.step, saga_item.c.number)
        found = await self._read(query.order_by(*order).limit(limit))
        return {item_name(row.step, row.number): StepState.from_json(row.state) for row in found}

    async def due_items(
        self, query: Query, *, before: datetime | None, limit: int
    ) -> Sequence[tuple[Instance, str, StepState]]:
        """Return the items of fan-outs that have a deadline, of the instances that are meant, the earliest first."""
        is_meant = replace(query, step=None, step_status=None).condition()
        ours: Any = [saga_item.c.due_at.is_not(None), text(f"saga_instance.{IN_FLIGHT}"), is_meant]
        if query.step is not None:
            ours.append(saga_item.c.step == query.step)
        if before is not None:
            ours.append(saga_item.c.due_at < before)
        found = await self._read(
            _select()
            .add_columns(saga_item.c.step, saga_item.c.number, saga_item.c.state.label("item"))
            .join(saga_item, saga_item.c.saga_id == saga_instance.c.id)
            .where(*ours)
            .order_by(saga_item.c.due_at)
            .limit(limit)
        )
        columns = len(_COLUMNS)
        return [
            (_instance(tuple(row)[:columns]), item_name(row.step, row.number), StepState.from_json(row.item))
            for row in found
        ]

    async def history(self, saga_id: UUID) -> Sequence[Row[Any]]:
        """Return the transitions of an instance, oldest first."""
        query = select(saga_history).where(saga_history.c.saga_id == saga_id).order_by(saga_history.c.revision)
        return await self._read(query)

    async def histories(self, sagas: Sequence[UUID]) -> Mapping[UUID, Sequence[Row[Any]]]:
        """Return the transitions of several instances, oldest first."""
        of_them = saga_history.c.saga_id.in_(sagas)
        query = select(saga_history).where(of_them).order_by(saga_history.c.saga_id, saga_history.c.revision)
        found: dict[UUID, list[Row[Any]]] = {saga: [] for saga in sagas}
        for row in await self._read(query):
            found[row.saga_id].append(row)
        return found

    async def count_by_status(self) -> dict[tuple[str, Status], int]:
        """Return how many instances there are of each saga in each status."""
        columns = (saga_instance.c.saga, saga_instance.c.status)
        rows = await self._read(select(*columns, func.count().label("number")).group_by(*columns))
        return {(row.saga, Status(row.status)): row.number for row in rows}

    async def count_in_flight(self) -> int:
        """Return how many instances are running or compensating; cheap whatever the number of finished ones."""
        query = select(func.count()).where(text(IN_FLIGHT)).select_from(saga_instance)
        return int((await self._read(query))[0][0])

    async def _read(self, query: Select[Any]) -> Sequence[Row[Any]]:
        async with self._reader.connect() as connection:
            rows: Sequence[Row[Any]] = (await connection.execute(query)).all()
        return rows


def _select() -> Select[Any]:
    return select(*(saga_instance.c[name] for name in _COLUMNS))


def _steps(instance: Instance) -> dict[str, Any]:
    return {name: at.to_json() for name, at in instance.steps.items() if step_and_item(name)[1] is None}


def _rows(instances: Sequence[Instance]) -> list[tuple[Any, ...]]:
    """Return rows in one order for everybody, so that two batches cannot deadlock over their keys."""
    return [_row(each) for each in sorted(instances, key=lambda instance: (instance.saga, instance.key))]


def _row(i: Instance) -> tuple[Any, ...]:
    return (
        i.id,
        i.saga,
        i.version,
        i.key,
        i.status.value,
        i.state,
        _steps(i),
        i.revision,
        i.due_at,
        i.reason,
        i.traceparent,
        i.created_at,
        i.updated_at,
        i.deadline,
        i.head,
        i.turned_back,
        i.origin and i.origin.to_json(),
        i.announced and i.announced.value,
    )


def _instance(row: Any) -> Instance:
    identity, saga, version, key, status, state, steps, revision, due_at, reason, traceparent, *others = row
    created, updated, deadline, head, turned_back, origin, announced = others
    return Instance(
        id=identity,
        saga=saga,
        version=version,
        key=key,
        status=Status(status),
        state=state,
        steps={name: StepState.from_json(at) for name, at in steps.items()},
        revision=revision,
        due_at=due_at,
        reason=reason,
        traceparent=traceparent,
        created_at=created,
        updated_at=updated,
        deadline=deadline,
        head=head,
        turned_back=turned_back,
        origin=Origin.from_json(origin) if origin else None,
        announced=Status(announced) if announced else None,
    )
