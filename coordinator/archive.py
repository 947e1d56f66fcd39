"""Retention: sagas that have ended are written to a file and taken out of the database, many at a time.

Of an archived saga the row stays, empty: its business key is still taken, so that a start which comes again is a
duplicate, and its last hash vouches for what was written. The row goes when its keys are kept no longer.
"""

import fcntl
import gzip
import mmap
import os
import zlib
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import UUID

from pydantic_core import to_json
from sqlalchemy import ColumnElement, Table, and_, func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.instance import UNFINISHED, Instance, Status
from coordinator.store import Store
from coordinator.tables import saga_history, saga_instance
from coordinator.views import document_of, plain_rows
from events.clock import Clock
from events.database import reader, transaction
from events.dead_letters import DEAD
from events.errors import ConfigurationError
from events.tables import dead_letter, metadata
from handlers.inbox import OF_SAGAS
from handlers.tables import inbox, retry

_PAGE = 200  # sagas in one transaction
_KEYS = 5000  # parameters of one statement
_CHUNK = 1 << 20
_OLD = (Status.COMPLETED.value, Status.COMPENSATED.value)
_GZIP = b"\x1f\x8b"
# All that belongs to an instance, whichever table it is in.
_PARTS = tuple(
    table
    for table in metadata.sorted_tables
    if any(key.column.table is saga_instance for key in table.foreign_keys) and "saga_id" in table.c
)


@dataclass(slots=True)
class Archived:
    """What was done so far.

    Attributes:
        sagas: how many were archived.
        held: how many have ended long enough ago, and stay: for a parent that goes on, or a message that waits.
        forgotten: of how many the key was given free.
    """

    sagas: int = 0
    held: int = 0
    forgotten: int = 0


class ArchiveFile:
    """A file of JSON lines, compressed, to which whole batches are appended; each is on disk before `append` returns.

    What a crash has left of a batch at its end is cut off when it is opened again.

    Raises:
        ConfigurationError: the file is something else, or damaged, or another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        is_new = not self._path.exists()
        try:
            self._file = self._path.open("ab")
        except OSError as error:
            raise ConfigurationError(f"{self._path} cannot be written: {error.strerror}") from error
        try:
            self._take()
        except ConfigurationError:
            self._file.close()
            raise
        if is_new:
            folder = os.open(self._path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigurationError(f"another process writes to {self._path}") from error
        self._file.truncate(_whole(self._path))

    def append(self, documents: Sequence[dict[str, Any]]) -> None:
        """Write a line for each of `documents`."""
        self._file.write(gzip.compress(b"".join(to_json(each) + b"\n" for each in documents)))
        self._file.flush()
        os.fsync(self._file.fileno())


class Archive:
    """Takes sagas out of a database.

    Args:
        engine: the database.
        clock: the time, where the database has none.
        before: sagas that have ended before this are archived, with what handlers remember of their commands.
        keys_before: keys of archived sagas that had ended before this are given free.
    """

    def __init__(self, engine: AsyncEngine, clock: Clock, *, before: datetime, keys_before: datetime) -> None:
        if keys_before > before:
            raise ConfigurationError("keys are kept at least as long as their sagas")
        self._engine = engine
        self._store = Store(engine, clock)
        self._before = before
        self._keys_before = keys_before
        self.done = Archived()

    async def count(self) -> tuple[int, int]:
        """Return how many sagas would be archived, and how many keys given free; some may have to stay."""
        async with reader(self._engine).connect() as connection:
            counts = [
                (await connection.execute(select(func.count()).select_from(saga_instance).where(each))).scalar_one()
                for each in (self._is_old, self._is_forgotten)
            ]
        return counts[0], counts[1]

    async def run(self, file: ArchiveFile | None) -> AsyncIterator[Archived]:
        """Archive all there is, and give keys free; return what was done so far, again and again.

        Each batch is on disk before it is deleted. Who is stopped between the two runs it again: the batch is then in
        the file twice.

        Args:
            file: where they are written; None to keep nothing of them.
        """
        after: UUID | None = None
        while (last := await self._archive_page(file, after)) is not None:
            after = last
            yield self.done
        while await self._forget_page():
            yield self.done

    async def _archive_page(self, file: ArchiveFile | None, after: UUID | None) -> UUID | None:
        columns = saga_instance.c
        ids = select(columns.id).where(self._is_old).order_by(columns.id).limit(_PAGE)
        if after is not None:
            ids = ids.where(columns.id > after)
        async with transaction(self._engine) as connection:
            found: list[UUID] = list((await connection.execute(ids)).scalars())
            if not found:
                return None
            # Locked now: one that has been woken meanwhile has moved on.
            loaded = await self._store.load(connection, found)
            ended = {key: each for key, each in loaded.items() if self._has_ended(each)}
            held = await _held(connection, ended)
            going = [identity for identity in ended if identity not in held]
            if going:
                documents = await _documents(connection, [ended[each] for each in going])
                if file is not None:
                    file.append(documents)
                await self._remove(connection, going, documents)
        self.done.sagas += len(going)
        self.done.held += len(held)
        return found[-1]

    async def _remove(
        self, connection: AsyncConnection, ids: Sequence[UUID], documents: Sequence[dict[str, Any]]
    ) -> None:
        for part in _PARTS:
            await connection.execute(part.delete().where(part.c.saga_id.in_(ids)))
        empty: dict[str, Any] = {
            "state": {},
            "steps": {},
            "due_at": None,
            "deadline": None,
            "reason": None,
            "traceparent": None,
        }
        stay = saga_instance.update().where(saga_instance.c.id.in_(ids))
        # Whoever has read it before decides again: it is written over the revision that was read.
        moved = {"status": Status.ARCHIVED.value, "revision": saga_instance.c.revision + 1}
        await connection.execute(stay.values(origin=None, **moved, **empty))
        sent = [each for document in documents for row in document["history"] for each in row["sent"]]
        commands = [UUID(each["id"]) for each in sent if "direction" in each]
        for first in range(0, len(commands), _KEYS):
            handled = inbox.c.message_key.in_(commands[first : first + _KEYS])
            old = and_(handled, inbox.c.consumer == OF_SAGAS, inbox.c.handled_at < self._before)
            await connection.execute(inbox.delete().where(old))

    async def _forget_page(self) -> bool:
        ids = select(saga_instance.c.id).where(self._is_forgotten).limit(_PAGE)
        async with transaction(self._engine) as connection:
            found = list((await connection.execute(ids)).scalars())
            if found:
                await connection.execute(saga_instance.delete().where(saga_instance.c.id.in_(found)))
        self.done.forgotten += len(found)
        return bool(found)

    @property
    def _is_old(self) -> ColumnElement[bool]:
        ended = saga_instance.c.status.in_(_OLD)
        return and_(ended, saga_instance.c.updated_at < self._before)

    @property
    def _is_forgotten(self) -> ColumnElement[bool]:
        archived = saga_instance.c.status == Status.ARCHIVED.value
        return and_(archived, saga_instance.c.updated_at < self._keys_before)

    def _has_ended(self, instance: Instance) -> bool:
        return instance.status.value in _OLD and instance.updated_at is not None and instance.updated_at < self._before


async def _held(connection: AsyncConnection, ended: dict[UUID, Instance]) -> set[UUID]:
    """Return those that somebody may still have to do with: a parent that goes on, or a message that waits."""
    children = {identity: each.origin.saga_id for identity, each in ended.items() if each.origin is not None}
    live = select(saga_instance.c.id).where(
        saga_instance.c.id.in_(set(children.values())),
        saga_instance.c.status.in_([each.value for each in UNFINISHED]),
    )
    parents = set((await connection.execute(live)).scalars()) if children else set()
    held = {identity for identity, parent in children.items() if parent in parents}
    for table, waits in ((retry, retry.c.saga_id.in_(ended)), (dead_letter, dead_letter.c.status == DEAD)):
        waiting = select(table.c.saga_id).where(table.c.saga_id.in_(ended), waits)
        held |= set((await connection.execute(waiting)).scalars())
    return held


async def _documents(connection: AsyncConnection, instances: Sequence[Instance]) -> list[dict[str, Any]]:
    """Return sagas as `coordinator sagas export` writes them, with all else that is kept of them."""
    ids = [each.id for each in instances]
    parts = {part: await _rows(connection, part, ids) for part in _PARTS}
    return [
        {
            **document_of(each, parts[saga_history].get(each.id, [])),
            **{
                part.name: plain_rows(rows.get(each.id, [])) for part, rows in parts.items() if part is not saga_history
            },
        }
        for each in instances
    ]


async def _rows(connection: AsyncConnection, part: Table, ids: Sequence[UUID]) -> dict[UUID, list[Any]]:
    order = [part.c.saga_id, part.c.revision] if part is saga_history else [part.c.saga_id, *part.primary_key]
    found: dict[UUID, list[Any]] = {}
    for row in await connection.execute(select(part).where(part.c.saga_id.in_(ids)).order_by(*order)):
        found.setdefault(row.saga_id, []).append(row)
    return found


def _whole(path: Path) -> int:
    """Return the length of the file up to the end of its last whole batch.

    Raises:
        ConfigurationError: it holds something else, or is damaged before its end: whole batches would be cut off, too.
    """
    end = _end_of_batches(path)
    if end < path.stat().st_size and _has_batch(path, end + 1):
        raise ConfigurationError(
            f"{path} is damaged at byte {end}, and has more sagas behind it: keep it as it is, and name another file"
        )
    return end


def _end_of_batches(path: Path) -> int:
    end = position = 0
    with path.open("rb") as file:
        if file.read(len(_GZIP)) not in (b"", _GZIP):
            raise ConfigurationError(f"{path} is no archive; name another file")
        file.seek(0)
        decoder = zlib.decompressobj(wbits=31)
        while chunk := file.read(_CHUNK):
            while chunk:
                try:
                    decoder.decompress(chunk)
                except zlib.error:
                    return end
                position += len(chunk) - len(decoder.unused_data)
                chunk = decoder.unused_data
                if decoder.eof:
                    end, decoder = position, zlib.decompressobj(wbits=31)
    return end


def _has_batch(path: Path, after: int) -> bool:
    """Say whether a whole batch begins somewhere behind."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        begin = content.find(_GZIP, after)
        while begin >= 0:
            decoder = zlib.decompressobj(wbits=31)
            position = begin
            with suppress(zlib.error):
                while position < len(content) and not decoder.eof:
                    decoder.decompress(content[position : position + _CHUNK])
                    position += _CHUNK
            if decoder.eof:
                return True
            begin = content.find(_GZIP, begin + 1)
    return False
