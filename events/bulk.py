"""Statements for many rows that mean the same on PostgreSQL and SQLite.

A batch is written with one statement a table: `unnest` over column arrays on PostgreSQL, `executemany` on
SQLite. They are plain SQL with driver parameters, since compiling large `VALUES` lists costs more than the
database does.
"""

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic_core import to_json
from sqlalchemy import Column, Dialect, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from events.errors import StaleRowError
from events.sqlite import execute, execute_many

Row = tuple[Any, ...]


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


@dataclass(frozen=True, slots=True)
class _Part:
    """A writing statement for PostgreSQL, as a part of a larger one.

    Attributes:
        statement: returns its text, with its parameters numbered from the argument on.
        parameters: an array for each column.
        changes: how many rows it must change; None where that follows from the statement.
    """

    statement: Callable[[int], str]
    parameters: Sequence[Any]
    changes: int | None = None


_DEFERRED = "saga_coordinator.deferred"
_DIVISION_BY_ZERO = "22012"


@asynccontextmanager
async def together(connection: AsyncConnection) -> AsyncIterator[None]:
    """Let the statements of the block travel as one at its end, where the database has such a statement.

    Each statement costs PostgreSQL and us a round trip, whatever it does; for a lone message the round trips
    are most of what it costs. As one statement they are a transaction, too, if none is open.

    Raises:
        StaleRowError: a compare-and-set has failed, and nothing was written.
    """
    if connection.dialect.name != "postgresql":
        yield
        return
    deferred: list[_Part] = []
    connection.info[_DEFERRED] = deferred
    try:
        yield
    finally:
        del connection.info[_DEFERRED]
    if deferred:
        await _write(connection, deferred)


async def _write(connection: AsyncConnection, parts: Sequence[_Part]) -> None:
    """Run `parts` as one statement with data-modifying CTEs (PostgreSQL manual, section 7.8.4).

    A compare-and-set that did not change all its rows must undo the whole: dividing by zero does.
    """
    parameters: list[Any] = []
    named: list[str] = []
    checks: list[str] = []
    for number, part in enumerate(parts):
        statement = part.statement(len(parameters) + 1)
        parameters += part.parameters
        if part.changes is not None:
            parameters.append(part.changes)
            statement += " RETURNING 1"
            checks.append(f"(SELECT count(*) FROM part_{number}) = ${len(parameters)}::bigint")  # noqa: S608  # numbers of ours
        named.append(f"part_{number} AS ({statement})")
    if len(parts) == 1 and not checks:
        sql = parts[0].statement(1)
    else:
        sql = f"WITH {', '.join(named)} SELECT 1 / ({' AND '.join(checks) or 'true'})::int"
    try:
        await connection.exec_driver_sql(sql, tuple(parameters))
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == _DIVISION_BY_ZERO:
            raise StaleRowError from error
        raise


async def _write_or_defer(connection: AsyncConnection, part: _Part) -> None:
    deferred: list[_Part] | None = connection.info.get(_DEFERRED)
    if deferred is None:
        await _write(connection, [part])
    else:
        deferred.append(part)


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

    async def insert(self, connection: AsyncConnection, rows: Sequence[Row], *, unless: Sequence[str] = ()) -> None:
        """Insert `rows`. May stand in a block of `together`.

        A conflict is an error; with `unless`, the columns of a unique key, the row that is there stays as it is.
        """
        if not rows:
            return
        dialect = connection.dialect
        names = ", ".join(self._names)
        tail = f" ON CONFLICT ({', '.join(unless)}) DO NOTHING" if unless else ""
        if dialect.name == "postgresql":
            await _write_or_defer(
                connection,
                _Part(
                    lambda first: f"INSERT INTO {self._table.name} ({names}) {self._unnest(dialect, first)}{tail}",
                    _bound_columns(self._columns, rows, dialect),
                ),
            )
            return
        sql = f"INSERT INTO {self._table.name} ({names}) VALUES ({', '.join('?' * len(self._names))}){tail}"  # noqa: S608
        await execute_many(connection, sql, _bound(self._columns, rows, dialect))

    async def insert_new(self, connection: AsyncConnection, rows: Sequence[Row], *, key: Sequence[str]) -> list[Any]:
        """Insert the rows whose unique `key` is not there yet; return the first column of those inserted."""
        if not rows:
            return []
        dialect = connection.dialect
        names = ", ".join(self._names)
        conflict = ", ".join(key)
        tail = f"ON CONFLICT ({conflict}) DO NOTHING RETURNING {self._names[0]}"
        result = self._columns[0].type._cached_result_processor(dialect, None)  # noqa: SLF001
        if dialect.name == "postgresql":
            sql = f"INSERT INTO {self._table.name} ({names}) {self._unnest(dialect)} {tail}"
            found = await connection.exec_driver_sql(sql, tuple(_bound_columns(self._columns, rows, dialect)))
            values = [row[0] for row in found]
        else:
            marks = ", ".join("?" * len(self._names))
            sql = f"INSERT INTO {self._table.name} ({names}) VALUES ({marks}) {tail}"  # noqa: S608
            values = []
            for row in _bound(self._columns, rows, dialect):
                values += [inserted[0] for inserted in await execute(connection, sql, row)]
        return values if result is None else [result(value) for value in values]

    async def update(
        self,
        connection: AsyncConnection,
        rows: Sequence[Row],
        *,
        key: str,
        expected: tuple[str, Sequence[Any]] | None = None,
    ) -> None:
        """Set all columns but `key` of the rows that `key` names. May stand in a block of `together`.

        With `expected`, the name of a column and the value it must still have in each row, this is a compare-and-set.

        Raises:
            StaleRowError: a row has another value: somebody else has written meanwhile. Roll back.
        """
        if not rows:
            return
        if connection.dialect.name == "postgresql":
            await _write_or_defer(connection, self._update_part(connection.dialect, rows, key, expected))
            return
        sets = ", ".join(f"{name} = ?" for name in self._names if name != key)
        at = self._names.index(key)
        sql = f"UPDATE {self._table.name} SET {sets} WHERE {key} = ?"  # noqa: S608
        bound = [(*row[:at], *row[at + 1 :], row[at]) for row in _bound(self._columns, rows, connection.dialect)]
        if expected:
            sql += f" AND {expected[0]} = ?"
            compared = _bound((self._table.c[expected[0]],), [(value,) for value in expected[1]], connection.dialect)
            bound = [(*values, *value) for values, value in zip(bound, compared, strict=True)]
        changed = await execute_many(connection, sql, bound)
        if expected and changed != len(rows):
            raise StaleRowError

    def _update_part(
        self, dialect: Dialect, rows: Sequence[Row], key: str, expected: tuple[str, Sequence[Any]] | None
    ) -> _Part:
        table = self._table.name
        sets = ", ".join(f"{name} = given.{name}" for name in self._names if name != key)
        parameters = _bound_columns(self._columns, rows, dialect)
        names, where, compared = [*self._names], "", None
        if expected:
            compared = self._table.c[expected[0]]
            parameters += _bound_columns((compared,), [(value,) for value in expected[1]], dialect)
            names.append("expected")
            where = f" AND {table}.{compared.name} = given.expected"

        def statement(first: int) -> str:
            return (
                f"UPDATE {table} SET {sets} FROM ({self._unnest(dialect, first, compared)})"  # noqa: S608
                f" AS given ({', '.join(names)}) WHERE {table}.{key} = given.{key}{where}"
            )

        return _Part(statement, parameters, len(rows) if expected else None)

    def _unnest(self, dialect: Dialect, first: int = 1, expected: Column[Any] | None = None) -> str:
        names = list(self._names)
        types = [_type_name(column, dialect) for column in self._columns]
        picks = [f"{name}::jsonb" if kind == "JSONB" else name for name, kind in zip(names, types, strict=True)]
        if expected is not None:
            types.append(_type_name(expected, dialect))
            names.append("expected")
            picks.append("expected")
        arrays = [f"${number}::{_array_type(kind)}" for number, kind in enumerate(types, first)]
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
        also: another table with this key, in which to look as well. Its rows have None for columns that it lacks; all
            rows then end in a number: 0 for those of `table`, 1 for those of this one.
    """

    def __init__(self, table: Table, *columns: str, key: str, lock: bool = False, also: Table | None = None) -> None:
        self._table = table
        self._also = also
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
        found: Iterable[Any]
        if dialect.name == "postgresql":
            found = await connection.exec_driver_sql(statement, (bound,))
        else:
            found = await execute(connection, statement, (to_json(bound).decode(),))
        processors = self._results[dialect.name]
        return [
            tuple(value if process is None else process(value) for process, value in zip(processors, row, strict=True))
            for row in found
        ]

    def _prepare(self, dialect: Dialect) -> str:
        names = [column.name for column in self._columns]
        postgres = dialect.name == "postgresql"
        among = f"= ANY($1::{_type_name(self._key, dialect)}[])" if postgres else "IN (SELECT value FROM json_each(?1))"
        where = f"WHERE {self._key.name} {among}"
        also = self._also
        if also is None:
            statement = f"SELECT {', '.join(names)} FROM {self._table.name} {where}"  # noqa: S608
        else:
            others = [name if name in also.c else "NULL" for name in names]
            statement = (
                f"SELECT {', '.join(names)}, 0 FROM {self._table.name} {where}"  # noqa: S608
                f" UNION ALL SELECT {', '.join(others)}, 1 FROM {also.name} {where}"
            )
        if self._lock and postgres:  # SQLite's only writer holds everything locked
            statement += f" ORDER BY {self._key.name} FOR UPDATE"
        processors = [column.type._cached_result_processor(dialect, None) for column in self._columns]  # noqa: SLF001
        self._results[dialect.name] = (*processors, *([] if also is None else [None]))
        self._statements[dialect.name] = statement
        return statement


async def delete_by_id(connection: AsyncConnection, table: Table, ids: Sequence[Any]) -> None:
    """Delete the rows of `table` whose `id` is among `ids`. May stand in a block of `together`."""
    await delete_by(connection, table, "id", ids)


async def delete_by(connection: AsyncConnection, table: Table, key: str, values: Collection[Any]) -> None:
    """Delete the rows of `table` whose `key` is among `values`. May stand in a block of `together`."""
    if not values:
        return
    dialect = connection.dialect
    bound = [row[0] for row in _bound((table.c[key],), [(value,) for value in values], dialect)]
    if dialect.name == "postgresql":
        kind = _type_name(table.c[key], dialect)
        await _write_or_defer(
            connection,
            _Part(lambda first: f"DELETE FROM {table.name} WHERE {key} = ANY(${first}::{kind}[])", (bound,)),  # noqa: S608
        )
    else:
        sql = f"DELETE FROM {table.name} WHERE {key} = ?"  # noqa: S608
        await execute_many(connection, sql, [(value,) for value in bound])
