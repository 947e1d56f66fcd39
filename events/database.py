"""One way to open PostgreSQL and SQLite, and bulk statements that mean the same on both.

A batch is written with one statement a table: `unnest` over column arrays on PostgreSQL, `executemany` on
SQLite. They are plain SQL with driver parameters, since compiling large `VALUES` lists costs more than the
database does.
"""

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any

from pydantic_core import from_json, to_json
from sqlalchemy import Column, Dialect, Table, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from events.errors import ConfigurationError
from events.sqlite import READ_ONLY, create_sqlite_engine

_RETRYABLE_STATES = {"40001", "40P01", "55P03", "57014", "57P01", "57P02", "57P03", "53300", "53200", "08006", "08003"}

Row = tuple[Any, ...]


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
            return create_async_engine(
                parsed.set(drivername="postgresql+asyncpg"),
                pool_size=pool_size,
                max_overflow=0,
                pool_timeout=10,
                json_serializer=_to_text,
                json_deserializer=from_json,
                connect_args={"server_settings": {"application_name": "saga-coordinator", "jit": "off"}, "timeout": 10},
            )
        case "sqlite":
            return create_sqlite_engine(
                parsed.set(drivername="sqlite+aiosqlite"),
                read_only=read_only,
                json_serializer=_to_text,
                json_deserializer=from_json,
            )
        case other:
            raise ConfigurationError(f"the database must be PostgreSQL or SQLite, not {other}")


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
        if error.connection_invalidated or isinstance(error, InterfaceError):
            return True
        state = getattr(error.orig, "sqlstate", None)
        if state is None and isinstance(error.orig, sqlite3.OperationalError):
            # A missing table is the same class of error as a file that is locked or full.
            return getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR
        if state is not None:
            return state in _RETRYABLE_STATES or state.startswith(("53", "08"))
        return isinstance(error, OperationalError)
    return isinstance(error, OSError | TimeoutError | PoolTimeoutError)


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Begin, and commit at the end of the block or roll back if it raises."""
    async with engine.begin() as connection:
        yield connection


@lru_cache(maxsize=256)
def _processors(columns: tuple[Column[Any], ...], dialect: Dialect) -> tuple[Callable[[Any], Any] | None, ...]:
    return tuple(column.type._cached_bind_processor(dialect) for column in columns)  # noqa: SLF001


def _bound_columns(columns: tuple[Column[Any], ...], rows: Sequence[Row], dialect: Dialect) -> list[Sequence[Any]]:
    """Turn Python values into driver values, as SQLAlchemy itself would; return an array for each column."""
    arrays: Iterable[Sequence[Any]] = zip(*rows, strict=True) if rows else [()] * len(columns)
    return [
        values if process is None else [process(value) for value in values]
        for process, values in zip(_processors(columns, dialect), arrays, strict=True)
    ]


def _bound(columns: tuple[Column[Any], ...], rows: Sequence[Row], dialect: Dialect) -> list[Row]:
    """Turn Python values into driver values; return the rows."""
    return list(zip(*_bound_columns(columns, rows, dialect), strict=True))


@lru_cache(maxsize=256)
def _type_name(column: Column[Any], dialect: Dialect) -> str:
    return column.type.dialect_impl(dialect).compile(dialect)


_DEFERRED = "saga_coordinator.deferred_inserts"
_Insert = tuple["Bulk", Sequence[Row]]


@asynccontextmanager
async def together(connection: AsyncConnection) -> AsyncIterator[None]:
    """Let the inserts of the block travel as one statement at its end, where the database has such a statement.

    Each statement costs PostgreSQL and us a round trip, whatever it does; for a lone message the round trips
    are most of what it costs.
    """
    if connection.dialect.name != "postgresql":
        yield
        return
    deferred: list[_Insert] = []
    connection.info[_DEFERRED] = deferred
    try:
        yield
    finally:
        del connection.info[_DEFERRED]
    if deferred:
        await _insert_together(connection, deferred)


async def _insert_together(connection: AsyncConnection, inserts: Sequence[_Insert]) -> None:
    dialect = connection.dialect
    parameters: list[Any] = []
    statements: list[str] = []
    for bulk, rows in inserts:
        statements.append(bulk.insert_from_arrays(dialect, len(parameters) + 1))
        parameters += bulk.arrays(rows, dialect)
    *others, last = statements
    parts = ", ".join(f"part_{number} AS ({statement})" for number, statement in enumerate(others))
    await connection.exec_driver_sql(f"WITH {parts} {last}" if parts else last, tuple(parameters))


class Bulk:
    """Writes many rows of one table with one statement.

    Args:
        table: the table.
        columns: the names of the columns that the rows hold, in order.
    """

    def __init__(self, table: Table, *columns: str) -> None:
        self._table = table
        self._names = columns
        self._columns = tuple(table.c[name] for name in columns)

    def insert_from_arrays(self, dialect: Dialect, first: int) -> str:
        """Return PostgreSQL's insert statement, its parameters numbered from `first`."""
        return f"INSERT INTO {self._table.name} ({', '.join(self._names)}) {self._unnest(dialect, first=first)}"

    def arrays(self, rows: Sequence[Row], dialect: Dialect) -> tuple[Any, ...]:
        """Return an array for each column."""
        return tuple(_bound_columns(self._columns, rows, dialect))

    async def insert(self, connection: AsyncConnection, rows: Sequence[Row]) -> None:
        """Insert `rows`; a conflict is an error. Within `together` they are inserted at the end of its block."""
        if not rows:
            return
        deferred: list[_Insert] | None = connection.info.get(_DEFERRED)
        if deferred is not None:
            deferred.append((self, rows))
            return
        if connection.dialect.name == "postgresql":
            await _insert_together(connection, [(self, rows)])
            return
        marks = ", ".join("?" * len(self._names))
        statement = f"INSERT INTO {self._table.name} ({', '.join(self._names)}) VALUES ({marks})"  # noqa: S608
        await connection.exec_driver_sql(statement, _bound(self._columns, rows, connection.dialect))

    async def insert_new(self, connection: AsyncConnection, rows: Sequence[Row], *, key: Sequence[str]) -> list[Any]:
        """Insert the rows whose unique `key` is not there yet; return the first column of those inserted."""
        dialect = connection.dialect
        names = ", ".join(self._names)
        conflict = ", ".join(key)
        tail = f"ON CONFLICT ({conflict}) DO NOTHING RETURNING {self._names[0]}"
        result = self._columns[0].type._cached_result_processor(dialect, None)  # noqa: SLF001
        if dialect.name == "postgresql":
            sql = f"INSERT INTO {self._table.name} ({names}) {self._unnest(dialect)} {tail}"
            found = await connection.exec_driver_sql(sql, self.arrays(rows, dialect))
            values = [row[0] for row in found]
        else:
            marks = ", ".join("?" * len(self._names))
            sql = f"INSERT INTO {self._table.name} ({names}) VALUES ({marks}) {tail}"  # noqa: S608
            values = []
            for row in _bound(self._columns, rows, dialect):
                values += [inserted[0] for inserted in await connection.exec_driver_sql(sql, row)]
        return values if result is None else [result(value) for value in values]

    async def update(
        self,
        connection: AsyncConnection,
        rows: Sequence[Row],
        *,
        key: str,
        expected: tuple[str, Sequence[Any]] | None = None,
    ) -> int:
        """Set all columns but `key` of the rows that `key` names; return how many rows there were.

        With `expected`, the name of a column and the value it must still have in each row, this is a
        compare-and-set: a smaller number than `rows` means that somebody else has written meanwhile.
        """
        dialect = connection.dialect
        others = [name for name in self._names if name != key]
        table = self._table.name
        if dialect.name == "postgresql":
            sets = ", ".join(f"{name} = given.{name}" for name in others)
            parameters = self.arrays(rows, dialect)
            source, where = self._unnest(dialect), ""
            if expected:
                column, values = expected
                array = f"${len(parameters) + 1}::{_array_type(_type_name(self._table.c[column], dialect))}"
                source, where = self._unnest(dialect, array), f" AND {table}.{column} = given.expected"
                parameters = (*parameters, list(values))
            names = ", ".join([*self._names, "expected"] if expected else self._names)
            sql = (
                f"UPDATE {table} SET {sets} FROM ({source}) AS given ({names})"  # noqa: S608
                f" WHERE {table}.{key} = given.{key}{where}"
            )
            result = await connection.exec_driver_sql(sql, parameters)
        else:
            sets = ", ".join(f"{name} = ?" for name in others)
            at = self._names.index(key)
            sql = f"UPDATE {table} SET {sets} WHERE {key} = ?"  # noqa: S608
            bound = [(*row[:at], *row[at + 1 :], row[at]) for row in _bound(self._columns, rows, dialect)]
            if expected:
                sql += f" AND {expected[0]} = ?"
                bound = [(*values, value) for values, value in zip(bound, expected[1], strict=True)]
            result = await connection.exec_driver_sql(sql, bound)
        return result.rowcount

    def _unnest(self, dialect: Dialect, expected: str | None = None, *, first: int = 1) -> str:
        arrays = [
            f"${number}::{_array_type(_type_name(column, dialect))}"
            for number, column in enumerate(self._columns, first)
        ]
        names = list(self._names)
        picks = [
            f"{name}::jsonb" if _type_name(column, dialect) == "JSONB" else name
            for name, column in zip(self._names, self._columns, strict=True)
        ]
        if expected:
            arrays.append(expected)
            names.append("expected")
            picks.append("expected")
        return f"SELECT {', '.join(picks)} FROM unnest({', '.join(arrays)}) AS rows ({', '.join(names)})"  # noqa: S608


def _array_type(name: str) -> str:
    # asyncpg wants jsonb values as text; they are cast back row by row
    return "text[]" if name == "JSONB" else f"{name}[]"


class Lookup:
    """Reads the rows of one table whose key is among many, with one statement.

    Args:
        table: the table.
        columns: the names of the columns to read.
        key: the column whose values are given.
        lock: lock the rows until the end of the transaction, in the order of their keys.
    """

    def __init__(self, table: Table, *columns: str, key: str, lock: bool = False) -> None:
        self._table = table
        self._columns = tuple(table.c[name] for name in columns)
        self._key = table.c[key]
        self._lock = lock
        self._statements: dict[str, str] = {}
        self._results: dict[str, tuple[Callable[[Any], Any] | None, ...]] = {}

    async def find(self, connection: AsyncConnection, keys: Sequence[Any]) -> list[Row]:
        """Return the rows of `keys`; keys without a row are left out."""
        dialect = connection.dialect
        bound = [row[0] for row in _bound((self._key,), [(key,) for key in keys], dialect)]
        statement = self._statements.get(dialect.name) or self._prepare(dialect)
        given = bound if dialect.name == "postgresql" else to_json(bound).decode()
        found = await connection.exec_driver_sql(statement, (given,))
        processors = self._results[dialect.name]
        return [
            tuple(value if process is None else process(value) for process, value in zip(processors, row, strict=True))
            for row in found
        ]

    def _prepare(self, dialect: Dialect) -> str:
        names = ", ".join(column.name for column in self._columns)
        postgres = dialect.name == "postgresql"
        among = f"= ANY($1::{_type_name(self._key, dialect)}[])" if postgres else "IN (SELECT value FROM json_each(?))"
        statement = f"SELECT {names} FROM {self._table.name} WHERE {self._key.name} {among}"  # noqa: S608
        if self._lock and postgres:  # SQLite's only writer holds everything locked
            statement += f" ORDER BY {self._key.name} FOR UPDATE"
        self._results[dialect.name] = tuple(
            column.type._cached_result_processor(dialect, None)  # noqa: SLF001
            for column in self._columns
        )
        self._statements[dialect.name] = statement
        return statement


async def delete_by_id(connection: AsyncConnection, table: Table, ids: Sequence[Any]) -> None:
    """Delete the rows of `table` whose `id` is among `ids`."""
    dialect = connection.dialect
    bound = [row[0] for row in _bound((table.c.id,), [(value,) for value in ids], dialect)]
    if dialect.name == "postgresql":
        sql = f"DELETE FROM {table.name} WHERE id = ANY($1::{_type_name(table.c.id, dialect)}[])"  # noqa: S608
        await connection.exec_driver_sql(sql, (bound,))
    else:
        sql = f"DELETE FROM {table.name} WHERE id = ?"  # noqa: S608
        await connection.exec_driver_sql(sql, [(value,) for value in bound])


async def ping(engine: AsyncEngine) -> None:
    """Raise if the database does not answer."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
