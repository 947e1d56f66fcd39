"""Checks a whole database, read-only and while it is worked on: hash chains, and what must hold of every saga.

All is read from one snapshot, many sagas at a time. What can be told of all rows alike the database tells itself, and
returns what is wrong only; sagas in which anything but plain successes has happened, or which are not what the changes
of their rows add up to, are told again row by row.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from operator import attrgetter
from typing import Any
from uuid import UUID

from sqlalchemy import Row, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.chain import COLUMNS, digest
from coordinator.invariants import Finding, Retold, adds_up, check_saga, overtaken
from coordinator.store import Store
from coordinator.tables import saga_history, saga_instance
from coordinator.verification_queries import (
    Page,
    bare,
    broken,
    completed,
    ended_in_vain,
    out_of_line,
    repeated,
    unusual,
)
from events.bulk import Lookup
from events.clock import Clock
from events.service import is_cancelled
from events.sqlite import READ_ONLY
from handlers.fence import MARKS
from handlers.inbox import OF_SAGAS
from handlers.tables import inbox

_PAGE = 10_000  # sagas that are checked at a time
_AT_ONCE = 4  # pages
_CHUNK = 500  # sagas that are told again at a time
_handled = Lookup(inbox, "message_key", "consumer", "reply", "handled_at", key="message_key")


@dataclass(slots=True)
class Checked:
    """How much has been checked so far."""

    sagas: int = 0
    transitions: int = 0
    retold: int = 0


class Verification:
    """One check of a database.

    Args:
        engine: the database; nothing is written to it.
        clock: the time, where the database has none.
        since: check only sagas that have moved since.
    """

    def __init__(self, engine: AsyncEngine, clock: Clock, *, since: datetime | None = None) -> None:
        self._engine = engine
        self._store = Store(engine, clock)
        self._since = since
        self.checked = Checked()

    async def findings(self) -> AsyncIterator[Finding]:
        """Return what does not hold, while it is being looked for."""
        await self._store.clock.calibrate()
        async with _snapshots(self._engine) as connections:
            pages: list[Page] = []
            while not pages or pages[-1].last is not None:
                pages = await self._next_pages(connections[0], pages[-1].last if pages else None, len(connections))
                checks = (self._check(*each) for each in zip(connections, pages, strict=False))
                for found in await asyncio.gather(*checks, return_exceptions=True):
                    if isinstance(found, BaseException):
                        raise found
                    for finding in found:
                        yield finding

    async def _next_pages(self, connection: AsyncConnection, after: UUID | None, most: int) -> list[Page]:
        """Return the next pages; the last one of all has no end."""
        pages: list[Page] = []
        while len(pages) < most and (not pages or pages[-1].last is not None):
            after = pages[-1].last if pages else after
            pages.append(Page(after, await self._end_of_page(connection, after), self._since))
        return pages

    async def _check(self, connection: AsyncConnection, page: Page) -> list[Finding]:
        found = await self._compare(connection, page)
        unclear = set((await connection.execute(unusual(page))).scalars()) | await self._not_adding_up(connection, page)
        ids = sorted(unclear)
        for first in range(0, len(ids), _CHUNK):
            found += await self._retell(connection, ids[first : first + _CHUNK])
        return found

    async def _end_of_page(self, connection: AsyncConnection, after: UUID | None) -> UUID | None:
        """Return the id of the last saga of the next page; None for the last page, which has no end."""
        ids = select(saga_instance.c.id).order_by(saga_instance.c.id).offset(_PAGE - 1).limit(1)
        if after is not None:
            ids = ids.where(saga_instance.c.id > after)
        end: UUID | None = (await connection.execute(ids)).scalar_one_or_none()
        return end

    async def _compare(self, connection: AsyncConnection, page: Page) -> list[Finding]:
        """Let the database say which rows do not follow from each other, and which instances not from their rows."""
        totals = select(func.count(), func.coalesce(func.sum(saga_instance.c.revision), 0)).where(page.of_instances)
        sagas, transitions = (await connection.execute(totals)).one()
        self.checked.sagas += sagas
        self.checked.transitions += transitions
        found = [each for row in await connection.execute(broken(page)) for each in _told(row)]
        for query, invariant, detail in (
            (repeated(page), "I2", "{step} has succeeded {times} times"),
            (ended_in_vain(page), "I1", "it is {status}, and an answer is outstanding"),
            (out_of_line(page), "I1", "it is {status}, which is not its turn in the line for its business key"),
            (bare(page), "I13", "it has no history"),
        ):
            rows = (await connection.execute(query)).mappings()
            found += [Finding(row["saga_id"], invariant, detail.format(**row)) for row in rows]
        return found

    async def _not_adding_up(self, connection: AsyncConnection, page: Page) -> set[UUID]:
        """Return completed sagas that are not what the changes of their rows add up to."""
        found = await connection.execute(completed(page))
        return {saga_id for saga_id, document in found if not adds_up(document)}

    async def _retell(self, connection: AsyncConnection, ids: Sequence[UUID]) -> list[Finding]:
        """Tell sagas again from their histories, and compare; one that cannot be read hides no other."""
        try:
            return await self._tell(connection, ids)
        except Exception as error:
            if is_cancelled() or isinstance(error, DBAPIError):
                raise
            if len(ids) == 1:
                return [Finding(ids[0], "I9", f"what is stored of it cannot be read: {error!r}")]
        return [finding for each in ids for finding in await self._retell(connection, [each])]

    async def _tell(self, connection: AsyncConnection, ids: Sequence[UUID]) -> list[Finding]:
        now = self._store.clock.now()
        instances = await self._store.load(connection, ids, lock=False)
        query = select(saga_history).where(saga_history.c.saga_id.in_(ids))
        rows = await connection.execute(query.order_by(saga_history.c.saga_id, saga_history.c.revision))
        found: list[Finding] = []
        undone: dict[UUID, Retold] = {}
        retold_sagas = 0
        for saga_id, history in groupby(rows, key=attrgetter("saga_id")):
            retold_sagas += 1
            findings, retold = check_saga(instances[saga_id], list(history), now)
            found += findings
            if retold.undone:
                undone[saga_id] = retold
        found += await _overtaken(connection, undone)
        self.checked.retold += retold_sagas
        return found


async def _overtaken(connection: AsyncConnection, undone: dict[UUID, Retold]) -> list[Finding]:
    """Ask the inbox whether commands were handled after their compensation; of handlers elsewhere it knows nothing."""
    sent = [ids for retold in undone.values() for each in (retold.done, retold.undone) for ids in each.values()]
    commands = [each for ids in sent for each in ids]
    if not commands:
        return []
    rows = [row for row in await _handled.find(connection, commands) if row[1] == OF_SAGAS]
    barred = frozenset(key for key, _, reply, _ in rows if reply in MARKS)
    handled = {key: at for key, _, _, at in rows}
    return [each for saga_id, retold in undone.items() for each in overtaken(saga_id, retold, handled, barred)]


@asynccontextmanager
async def _snapshots(engine: AsyncEngine) -> AsyncIterator[list[AsyncConnection]]:
    """Read everything as it is now, whatever is committed meanwhile; nobody waits for us.

    On PostgreSQL several connections see the same (manual, section 9.27.5), so that more than one core is at work.
    """
    if engine.dialect.name != "postgresql":
        async with _snapshot_on_sqlite(engine) as connection:
            yield [connection]
        return
    reading = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(reading.connect()) for _ in range(_AT_ONCE)]
        name = (await connections[0].exec_driver_sql("SELECT pg_export_snapshot()")).scalar_one()
        for each in connections[1:]:
            await each.exec_driver_sql(f"SET TRANSACTION SNAPSHOT '{name}'")
        yield connections


@asynccontextmanager
async def _snapshot_on_sqlite(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    async with engine.execution_options(**{READ_ONLY: True}).connect() as connection:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        await raw.create_function("saga_digest", len(COLUMNS) + 1, digest, deterministic=True)
        await connection.exec_driver_sql("BEGIN")
        yield connection


def _told(row: Row[Any]) -> list[Finding]:
    """Return what is wrong with a row that `broken` has found."""
    at = f"revision {row.revision}"
    said = {
        "gap": ("I13", f"{at}: a row before it is missing"),
        "chain": ("I13", f"{at}: it, or the row before it, is not what was written"),
        "begin": ("I10", f"{at}: it does not begin with a start"),
        "path": ("I10", f"{at}: {row.now} does not follow from {row.status_before}"),
        "gone": ("I13", "its history is there, and it is not"),
        "head": ("I13", f"its last row is {at}, and it knows of another one"),
        "status": ("I9", f"its status is not that of its last row, {row.now}"),
        "reason": ("I9", "its reason is not that of its last row"),
        "time": ("I9", "it was written at another time than its last row"),
    }
    return [Finding(row.saga_id, *about) for name, about in said.items() if getattr(row, name)]
