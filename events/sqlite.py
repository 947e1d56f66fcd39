"""SQLite for one process: one connection, `BEGIN IMMEDIATE`, WAL, every commit on disk.

Measured on two cores: through aiosqlite, whose every call is a trip to another thread, a transaction of four
statements takes 4.8 ms; with the statements run in place and only the commit (which waits for the disk) in a
thread it takes 1.1 ms. So the engine is SQLAlchemy's own aiosqlite dialect, handed a connection of ours.

One connection a process is a rule, not a default: releases before 3.51.3 can damage a WAL file that several
connections write to, and a second connection could only wait for the first.
"""

import asyncio
import fcntl
import sqlite3
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any, Self

from sqlalchemy import event
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from events.errors import DatabaseInUseError

READ_ONLY = "saga_coordinator_read_only"  # an execution option: what follows only reads


class _Cursor:
    """What SQLAlchemy's asyncio adapter expects of a cursor; statements run in place."""

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        self._cursor = cursor

    async def __aenter__(self) -> Self:
        return self

    @property
    def plain(self) -> sqlite3.Cursor:
        return self._cursor

    @property
    def description(self) -> Any:
        return self._cursor.description

    @property
    def rowcount(self) -> int:
        return self._cursor.rowcount

    @property
    def lastrowid(self) -> int | None:
        return self._cursor.lastrowid

    async def execute(self, operation: str, parameters: Sequence[Any] = ()) -> Self:
        self._cursor.execute(operation, parameters)
        return self

    async def executemany(self, operation: str, parameters: Sequence[Sequence[Any]]) -> Self:
        self._cursor.executemany(operation, parameters)
        return self

    async def fetchall(self) -> list[Any]:
        return self._cursor.fetchall()

    async def close(self) -> None:
        self._cursor.close()


class _Connection:
    """What SQLAlchemy's asyncio adapter expects of an aiosqlite connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._conn = self._connection = connection  # the names that the adapter looks for
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="sqlite-commit")

    @property
    def isolation_level(self) -> str | None:
        return self._conn.isolation_level

    def cursor(self) -> _Cursor:
        return _Cursor(self._conn.cursor())

    async def create_function(self, *args: Any, **kwargs: Any) -> None:
        self._conn.create_function(*args, **kwargs)

    async def commit(self) -> None:
        if self._conn.in_transaction:
            # A cancelled caller must not leave a commit running behind the back of the next transaction.
            running = asyncio.get_running_loop().run_in_executor(self._committer, self._conn.commit)
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError:
                await asyncio.wait([running])
                raise

    async def rollback(self) -> None:
        self._conn.rollback()

    async def close(self) -> None:
        self.stop()

    def stop(self) -> None:
        self._committer.shutdown(wait=True)
        self._conn.close()


@asynccontextmanager
async def without_foreign_keys(connection: AsyncConnection) -> AsyncIterator[None]:
    """Let a table be made anew that others refer to, in a transaction of the block: its rows would hold it.

    SQLite has no other way ("ALTER TABLE", section "Making Other Kinds Of Table Schema Changes"). The keys are checked
    when the transaction is about to end, by whoever has begun it: `check_foreign_keys`.
    """
    cursor = (await connection.get_raw_connection()).driver_connection.cursor().plain  # type: ignore[union-attr]
    cursor.execute("PRAGMA foreign_keys=OFF")  # in a transaction it would do nothing
    try:
        yield
    finally:
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()


async def check_foreign_keys(connection: AsyncConnection) -> None:
    """Raise if a row refers to one that is not there.

    Raises:
        sqlalchemy.exc.DBAPIError: as SQLAlchemy would.
    """
    if (await execute(connection, "PRAGMA foreign_key_check")).fetchall():
        raise _translated(sqlite3.IntegrityError("FOREIGN KEY constraint failed"), "PRAGMA", connection)


async def execute(connection: AsyncConnection, statement: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
    """Run a statement straight on the driver: through SQLAlchemy the two of a hop take 184 us, here 9.

    Raises:
        sqlalchemy.exc.DBAPIError: as SQLAlchemy would.
    """
    cursor: _Cursor = await _cursor(connection)
    try:
        return (await cursor.execute(statement, parameters)).plain
    except sqlite3.Error as error:
        raise _translated(error, statement, connection) from error


async def execute_many(connection: AsyncConnection, statement: str, rows: Sequence[Sequence[Any]]) -> int:
    """Run a statement for each of `rows` straight on the driver; return how many rows it has changed."""
    if not rows:
        return 0
    cursor: _Cursor = await _cursor(connection)
    try:
        return (await cursor.executemany(statement, rows)).rowcount
    except sqlite3.Error as error:
        raise _translated(error, statement, connection) from error


async def _cursor(connection: AsyncConnection) -> Any:
    if not connection.in_transaction() and not _only_reads(connection):
        await connection.begin()
    return connection.sync_connection.connection.driver_connection.cursor()  # type: ignore[union-attr]  # it is open


def _only_reads(connection: AsyncConnection) -> bool:
    options = connection.sync_connection.get_execution_options() if connection.sync_connection else {}
    return bool(options.get(READ_ONLY))


def _translated(error: sqlite3.Error, statement: str, connection: AsyncConnection) -> BaseException:
    return DBAPIError.instance(statement, None, error, sqlite3.Error, dialect=connection.dialect)


def create_sqlite_engine(url: URL, *, read_only: bool = False, **options: Any) -> AsyncEngine:
    """Return the engine for the SQLite file of `url` (`:memory:` works for tests).

    `read_only` is for a second process that only looks; `options` go to SQLAlchemy's `create_async_engine`.
    """
    path = url.database or ":memory:"
    name = f"{Path(path).absolute().as_uri()}?mode=ro" if read_only else path

    async def connect(*_: Any, **__: Any) -> _Connection:
        # isolation_level=None: no implicit BEGIN; ours is IMMEDIATE. cached_statements: all of ours fit.
        return _Connection(
            sqlite3.connect(name, isolation_level=None, check_same_thread=False, cached_statements=512, uri=read_only)
        )

    engine = create_async_engine(
        url,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=1,
        max_overflow=0,
        pool_timeout=30,
        async_creator=connect,
        **options,
    )
    if not read_only:
        event.listen(engine.sync_engine, "connect", _prepare)
    event.listen(engine.sync_engine, "begin", _begin_immediate)
    return engine


def _prepare(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    if connection.get_execution_options().get(READ_ONLY):
        return  # single statements that need no transaction
    # A deferred transaction that reads and then writes fails at once with SQLITE_BUSY_SNAPSHOT, timeout or not.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


class FileLock:
    """Held by the one process that works on an SQLite file; released by the kernel when it dies."""

    def __init__(self, database: str) -> None:
        self._path = Path(f"{database}.lock")
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            DatabaseInUseError: another process has it.
        """
        file = self._path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise DatabaseInUseError from error
        self._file = file

    def release(self) -> None:
        """Give the lock back; doing so twice is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None
