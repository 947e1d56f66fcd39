"""One way to open PostgreSQL and SQLite, to run a transaction, and to tell errors that pass from those that do not."""

import socket
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pydantic_core import from_json, to_json
from sqlalchemy import event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool

from events.errors import ConfigurationError
from events.sqlite import READ_ONLY, create_sqlite_engine

_REFUSED = {"40001", "40P01", "55P03", "57014"}  # conflicts, deadlocks, timeouts, cancelled by an administrator
_KEPT_FREE = 4
# Probe after 15 s of silence, thrice, and wait for 30 s at most for what was sent to be received: asyncpg does neither.
_TCP = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
_GOING_OR_COMING = {"57P01", "57P02", "57P03"}  # shut down, crashed, not up yet


def open_database(url: str | URL, *, pool_size: int = 5, read_only: bool = False) -> AsyncEngine:
    """Return an engine for `postgresql+asyncpg://` or `sqlite+aiosqlite:///file`. Nothing connects yet.

    `postgresql://` and `sqlite:///` stand for the same drivers. `read_only` lets a second process look into an
    SQLite file that another one works on.

    Raises:
        ConfigurationError: the URL is not one of these.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigurationError("the database URL cannot be read; write postgresql://... or sqlite:///file") from error
    match parsed.get_backend_name():
        case "postgresql":
            engine = create_async_engine(
                parsed.set(drivername="postgresql+asyncpg"),
                pool_size=pool_size,
                max_overflow=0,
                pool_timeout=10,
                json_serializer=_to_text,
                json_deserializer=from_json,
                connect_args={"server_settings": {"application_name": "saga-coordinator", "jit": "off"}, "timeout": 10},
            )
            event.listen(engine.sync_engine, "connect", _notice_dead_peers)
            return engine
        case "sqlite":
            return create_sqlite_engine(
                parsed.set(drivername="sqlite+aiosqlite"),
                read_only=read_only,
                json_serializer=_to_text,
                json_deserializer=from_json,
            )
        case other:
            raise ConfigurationError(f"the database must be PostgreSQL or SQLite, not {other}")


def _notice_dead_peers(connection: Any, _record: Any) -> None:
    """Let a connection whose other end has vanished without a word fail, with whatever waits for its answer."""
    found: socket.socket = connection.driver_connection._transport.get_extra_info("socket")  # noqa: SLF001
    if found.family == socket.AF_UNIX:
        return
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _TCP.items():
        if hasattr(socket, name):  # not everywhere
            found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def room_for_long(engine: AsyncEngine) -> int:
    """Return how many transactions may be long: who only has a statement to run must not wait for their ends."""
    pool = engine.pool
    return max(1, pool.size() - _KEPT_FREE) if isinstance(pool, QueuePool) else 1


def single_statements(engine: AsyncEngine) -> AsyncEngine:
    """Return `engine` for statements that are a transaction each, without the round trips around them."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(isolation_level="AUTOCOMMIT")
    return engine


def sqlite_file(url: str | URL) -> str | None:
    """Return the file of an SQLite URL; None for other databases and for databases in memory."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return parsed.database


def reader(engine: AsyncEngine) -> AsyncEngine:
    """Return `engine` for single reading statements, without the round trips of a transaction around them."""
    if engine.dialect.name == "postgresql":
        return single_statements(engine)
    return engine.execution_options(**{READ_ONLY: True})


def _to_text(value: Any) -> str:
    return to_json(value).decode()


def is_transient(error: BaseException) -> bool:
    """Say whether the whole transaction may be tried again: lost connections, deadlocks, timeouts, full pools."""
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return True
        state = getattr(error.orig, "sqlstate", None)
        if state is None and isinstance(error.orig, sqlite3.OperationalError):
            # A missing table is the same class of error as a file that is locked or full.
            return getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR
        if state is not None:
            return state in _REFUSED or state in _GOING_OR_COMING or state.startswith(("53", "08"))
        return isinstance(error, OperationalError)
    return isinstance(error, OSError | TimeoutError | PoolTimeoutError)


def is_refused(error: BaseException) -> bool:
    """Say whether the database is there, and has ended this very transaction: a deadlock, a conflict, a timeout."""
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in _REFUSED


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Begin, and commit at the end of the block or roll back if it raises."""
    async with engine.begin() as connection:
        yield connection


async def ping(engine: AsyncEngine) -> None:
    """Raise if the database does not answer."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
