"""What both databases promise alike: bulk statements, transactions, and which errors are worth another try."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Column, Integer, LargeBinary, MetaData, Table, Text, Uuid, event, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from events.bulk import Bulk, Lookup, delete_by_id, together
from events.database import (
    is_transient,
    open_database,
    ping,
    reader,
    single_statements,
    sqlite_file,
    transaction,
)
from events.errors import ConfigurationError, DatabaseInUseError, StaleRowError
from events.sqlite import FileLock
from events.storeclock import StoreClock
from events.tables import Json, Timestamp
from tests.support.base import free_port
from tests.support.flows import PATIENCE, ManualClock, until
from tests.support.servers import Postgres

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)

metadata = MetaData()
thing = Table(
    "thing",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, unique=True),
    Column("size", Integer),
    Column("body", LargeBinary),
    Column("state", Json),
    Column("at", Timestamp),
)
COLUMNS = ("id", "name", "size", "body", "state", "at")
bulk = Bulk(thing, *COLUMNS)
lookup = Lookup(thing, *COLUMNS, key="id", lock=True)

Thing = tuple[Any, ...]


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    opened = open_database(database_url)
    async with transaction(opened) as connection:
        await connection.run_sync(metadata.create_all)
    yield opened
    await opened.dispose()


def things(count: int) -> list[Thing]:
    states: list[Any] = [{"a": [1, None, "\u00e9", {"b": 1.5}]}, [], "text", None, 7, True]
    return [(uuid4(), f"name {n}", n, bytes([n, 0, 255]), states[n % len(states)], NOW) for n in range(count)]


async def insert(engine: AsyncEngine, rows: list[Thing]) -> None:
    async with transaction(engine) as connection:
        await bulk.insert(connection, rows)


async def find(engine: AsyncEngine, ids: list[UUID]) -> dict[UUID, Thing]:
    async with transaction(engine) as connection:
        return {row[0]: row for row in await lookup.find(connection, ids)}


# Bulk statements


async def test_rows_come_back_as_they_were_written(engine: AsyncEngine) -> None:
    rows = things(12)
    await insert(engine, rows)
    assert await find(engine, [row[0] for row in rows]) == {row[0]: row for row in rows}


async def test_null_is_null_in_every_column(engine: AsyncEngine) -> None:
    row = (uuid4(), None, None, None, None, None)
    await insert(engine, [row])
    assert await find(engine, [row[0]]) == {row[0]: row}


async def test_no_rows_are_no_statement(engine: AsyncEngine) -> None:
    await insert(engine, [])
    assert await find(engine, []) == {}


async def test_keys_without_a_row_are_left_out(engine: AsyncEngine) -> None:
    rows = things(2)
    await insert(engine, rows)
    assert set(await find(engine, [rows[0][0], uuid4()])) == {rows[0][0]}


async def test_a_conflict_is_an_error_and_nothing_of_the_batch_is_written(engine: AsyncEngine) -> None:
    rows = things(3)
    await insert(engine, rows[:1])
    with pytest.raises(IntegrityError):
        await insert(engine, [rows[1], rows[0], rows[2]])
    assert len(await find(engine, [row[0] for row in rows])) == 1


async def test_only_new_rows_are_inserted_and_named(engine: AsyncEngine) -> None:
    rows = things(4)
    await insert(engine, rows[:2])
    async with transaction(engine) as connection:
        inserted = await bulk.insert_new(connection, rows, key=["id"])
    assert set(inserted) == {row[0] for row in rows[2:]}
    async with transaction(engine) as connection:
        assert await bulk.insert_new(connection, rows, key=["id"]) == []


async def test_all_columns_but_the_key_are_updated(engine: AsyncEngine) -> None:
    rows = things(3)
    await insert(engine, rows)
    changed = [(row[0], f"new {row[1]}", row[2] + 10, b"", {"new": True}, None) for row in rows[:2]]
    async with transaction(engine) as connection:
        await bulk.update(connection, changed, key="id")
    assert await find(engine, [row[0] for row in rows]) == {row[0]: row for row in [*changed, rows[2]]}


async def test_an_update_that_expects_a_value_sets_all_rows_that_have_it(engine: AsyncEngine) -> None:
    rows = things(3)
    await insert(engine, rows)
    changed = [(*row[:2], row[2] + 1, *row[3:]) for row in rows]
    async with transaction(engine) as connection:
        await bulk.update(connection, changed, key="id", expected=("size", [0, 1, 2]))
    found = await find(engine, [row[0] for row in rows])
    assert [found[row[0]][2] for row in rows] == [1, 2, 3]


async def test_an_update_that_finds_another_value_than_expected_changes_nothing(engine: AsyncEngine) -> None:
    rows = things(3)
    await insert(engine, rows)
    changed = [(*row[:2], row[2] + 1, *row[3:]) for row in rows]
    with pytest.raises(StaleRowError):
        async with transaction(engine) as connection:
            await bulk.update(connection, changed, key="id", expected=("size", [0, 99, 2]))
    assert await find(engine, [row[0] for row in rows]) == {row[0]: row for row in rows}


@pytest.mark.parametrize("expected", [[0, 1], [0, 99]])
async def test_what_is_written_together_is_written_or_not_as_a_whole(engine: AsyncEngine, expected: list[int]) -> None:
    """Also without a transaction around it where it is one statement, and with rows of two tables."""
    rows = things(4)
    await insert(engine, rows[:2])
    changed = [(*row[:2], row[2] + 1, *row[3:]) for row in rows[:2]]
    stale = 99 in expected
    connecting = single_statements(engine).begin()
    with pytest.raises(StaleRowError) if stale else contextlib.nullcontext():
        async with connecting as connection, together(connection):
            await bulk.insert(connection, rows[2:3])
            await bulk.update(connection, changed, key="id", expected=("size", expected))
            await bulk.insert(connection, rows[3:])
            await bulk.insert(connection, [])
    found = await find(engine, [row[0] for row in rows])
    kept = rows[:2] if stale else [*changed, *rows[2:]]
    assert found == {row[0]: row for row in kept}


@pytest.mark.postgres
async def test_what_is_written_together_is_one_statement(pg_url: str) -> None:
    engine = open_database(pg_url)
    statements: list[str] = []
    async with transaction(engine) as connection:
        await connection.run_sync(metadata.create_all)
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *about: statements.append(about[2]))
    async with single_statements(engine).connect() as connection, together(connection):
        await bulk.insert(connection, things(2))
        await bulk.insert(connection, [(uuid4(), *row[1:]) for row in things(4)[2:]])
    assert len(statements) == 1
    await engine.dispose()


async def test_rows_are_deleted_by_id(engine: AsyncEngine) -> None:
    rows = things(5)
    await insert(engine, rows)
    async with transaction(engine) as connection:
        await delete_by_id(connection, thing, [row[0] for row in rows[:3]])
    assert set(await find(engine, [row[0] for row in rows])) == {row[0] for row in rows[3:]}


async def test_a_thousand_rows_are_one_batch(engine: AsyncEngine) -> None:
    rows = [(uuid4(), f"name {n}", n, b"", None, NOW) for n in range(1000)]
    await insert(engine, rows)
    assert len(await find(engine, [row[0] for row in rows])) == 1000


async def test_single_reads_need_no_transaction(engine: AsyncEngine) -> None:
    rows = things(1)
    await insert(engine, rows)
    async with reader(engine).connect() as connection:
        [found] = await lookup.find(connection, [rows[0][0]])
    assert found == rows[0]
    await insert(engine, things(2)[1:])  # the connection is free again, and writes


async def test_an_exception_rolls_back(engine: AsyncEngine) -> None:
    rows = things(1)
    with contextlib.suppress(ZeroDivisionError):
        async with transaction(engine) as connection:
            await bulk.insert(connection, rows)
            raise ZeroDivisionError
    assert await find(engine, [rows[0][0]]) == {}


async def test_a_cancelled_transaction_rolls_back_and_the_database_goes_on(engine: AsyncEngine) -> None:
    rows = things(1)
    begun = asyncio.Event()

    async def work() -> None:
        async with transaction(engine) as connection:
            await bulk.insert(connection, rows)
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await find(engine, [rows[0][0]]) == {}
    await insert(engine, rows)


async def test_a_database_that_answers_is_alive(engine: AsyncEngine) -> None:
    await ping(engine)


# Which errors are transient


async def run(engine: AsyncEngine, *statements: str) -> None:
    async with transaction(engine) as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def error_of(engine: AsyncEngine, *statements: str) -> Exception:
    with pytest.raises((SQLAlchemyError, OSError)) as caught:
        await run(engine, *statements)
    return caught.value


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM no_such_table",
        "SELECT no_such_column FROM thing",
        "SELEKT 1",
        "INSERT INTO thing (id) VALUES (NULL)",
        "SELECT no_such_function(1)",
    ],
)
async def test_a_statement_that_can_never_work_is_not_tried_again(engine: AsyncEngine, statement: str) -> None:
    assert not is_transient(await error_of(engine, statement))


async def test_a_value_that_does_not_fit_is_not_tried_again(engine: AsyncEngine) -> None:
    row = things(1)[0]
    await insert(engine, [row])
    for other in ((uuid4(), *row[1:]), row):
        with pytest.raises(IntegrityError) as caught:
            await insert(engine, [other])
        assert not is_transient(caught.value)


@pytest.mark.parametrize("error", [ValueError(), RuntimeError(), asyncio.CancelledError(), KeyError()])
def test_an_error_that_is_not_the_databases_is_not_tried_again(error: BaseException) -> None:
    assert not is_transient(error)


@pytest.mark.parametrize("error", [ConnectionResetError(), ConnectionRefusedError(), TimeoutError(), OSError()])
def test_a_lost_connection_is_tried_again(error: BaseException) -> None:
    assert is_transient(error)


async def test_a_full_pool_is_tried_again(engine: AsyncEngine) -> None:
    small = create_async_engine(engine.url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    try:
        async with small.connect() as _:
            error = await error_of(small, "SELECT 1")
    finally:
        await small.dispose()
    assert is_transient(error)


async def test_a_locked_sqlite_file_is_tried_again(sqlite_url: str) -> None:
    """Another process, a backup tool perhaps, writes to the file."""
    first, second = open_database(sqlite_url), open_database(sqlite_url)
    try:
        async with transaction(second) as connection:
            await connection.execute(text("PRAGMA busy_timeout=0"))
        async with transaction(first) as connection:
            await connection.execute(text("CREATE TABLE t (a INTEGER)"))
            error = await error_of(second, "INSERT INTO t VALUES (1)")
        assert is_transient(error)
    finally:
        await first.dispose()
        await second.dispose()


@pytest.mark.postgres
async def test_a_server_that_is_not_there_is_tried_again() -> None:
    engine = open_database(f"postgresql://test@127.0.0.1:{free_port()}/test")
    assert is_transient(await error_of(engine, "SELECT 1"))
    await engine.dispose()


@pytest.mark.postgres
async def test_a_connection_that_the_server_ended_is_tried_again_and_works(pg_url: str) -> None:
    engine, other = open_database(pg_url, pool_size=1), open_database(pg_url)
    try:
        async with transaction(engine) as connection:
            pid = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        async with transaction(other) as connection:
            await connection.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
        assert is_transient(await error_of(engine, "SELECT 1"))
        await ping(engine)
    finally:
        await engine.dispose()
        await other.dispose()


@pytest.mark.postgres
async def test_a_connection_whose_other_end_has_vanished_fails_within_half_a_minute(pg_url: str) -> None:
    """A rollback once waited for its answer as long as the system tries to deliver: a quarter of an hour."""
    engine = open_database(pg_url)
    try:
        async with engine.connect() as connection:
            raw = await connection.get_raw_connection()
            assert raw.driver_connection is not None
            found = raw.driver_connection._transport.get_extra_info("socket")
            assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            assert [found.getsockopt(socket.IPPROTO_TCP, name) for name in names] == [15, 5, 3, 30_000]
    finally:
        await engine.dispose()


@pytest.mark.postgres
@pytest.mark.parametrize("setting", ["statement_timeout", "lock_timeout"])
async def test_a_timeout_of_the_server_is_tried_again(pg_url: str, setting: str) -> None:
    engine = open_database(pg_url)
    try:
        async with transaction(engine) as connection:
            await connection.execute(text("CREATE TABLE t (a INTEGER)"))
        async with transaction(engine) as connection:
            await connection.execute(text("LOCK TABLE t"))
            assert is_transient(await error_of(engine, f"SET LOCAL {setting} = '10ms'", "SELECT * FROM t"))
    finally:
        await engine.dispose()


@pytest.mark.postgres
async def test_a_deadlock_is_tried_again_by_the_one_who_lost(pg_url: str) -> None:
    engine = open_database(pg_url)
    try:
        async with transaction(engine) as connection:
            await connection.execute(text("CREATE TABLE t (a INTEGER PRIMARY KEY)"))
            await connection.execute(text("INSERT INTO t VALUES (1), (2)"))
        met = asyncio.Barrier(2)

        async def lock(first: int, second: int) -> BaseException | None:
            try:
                async with transaction(engine) as connection:
                    await connection.execute(text("SET LOCAL deadlock_timeout = '10ms'"))
                    await connection.execute(text(f"SELECT * FROM t WHERE a = {first} FOR UPDATE"))
                    await met.wait()
                    await connection.execute(text(f"SELECT * FROM t WHERE a = {second} FOR UPDATE"))
            except SQLAlchemyError as error:
                return error
            return None

        async with asyncio.timeout(PATIENCE):
            errors = [error for error in await asyncio.gather(lock(1, 2), lock(2, 1)) if error]
        assert len(errors) == 1
        assert is_transient(errors[0])
    finally:
        await engine.dispose()


@pytest.mark.postgres
async def test_a_conflict_of_serializable_transactions_is_tried_again(pg_url: str) -> None:
    engine = open_database(pg_url)
    serializable = engine.execution_options(isolation_level="SERIALIZABLE")
    try:
        async with transaction(engine) as connection:
            await connection.execute(text("CREATE TABLE t (a INTEGER)"))
            await connection.execute(text("INSERT INTO t VALUES (1)"))

        async def conflict() -> None:
            async with transaction(serializable) as connection:
                await connection.execute(text("SELECT * FROM t"))
                await run(serializable, "UPDATE t SET a = 2")
                await connection.execute(text("UPDATE t SET a = 3"))

        with pytest.raises(SQLAlchemyError) as caught:
            await conflict()
        assert is_transient(caught.value)
    finally:
        await engine.dispose()


@pytest.mark.postgres
async def test_every_error_of_a_server_that_is_killed_and_starts_again_is_tried_again(
    private_postgres: Postgres, private_pg_url: str
) -> None:
    """While it starts, it refuses connections in several ways."""
    engine = open_database(private_pg_url)
    strange: list[BaseException] = []
    answers = 0

    async def ask_again_and_again() -> None:
        nonlocal answers
        while True:
            try:
                await ping(engine)
                answers += 1
            except Exception as error:  # noqa: BLE001  # whatever it is, it has to be transient
                if not is_transient(error):
                    strange.append(error)

    try:
        async with transaction(engine) as connection:
            await connection.execute(text("CREATE TABLE t (a INTEGER)"))
        task = asyncio.create_task(ask_again_and_again())
        await asyncio.to_thread(private_postgres.kill9)
        await asyncio.to_thread(private_postgres.start)
        await asyncio.to_thread(private_postgres.restart)
        before = answers

        async def answered() -> bool:
            return answers > before

        await until(answered)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert strange == []
    finally:
        await engine.dispose()


# Opening


def test_a_short_url_stands_for_the_same_driver() -> None:
    for url in ("sqlite:///file.db", "sqlite+aiosqlite:///file.db"):
        assert open_database(url).dialect.driver == "aiosqlite"
        assert sqlite_file(url) == "file.db"
    assert open_database("postgresql://host/name").dialect.driver == "asyncpg"


@pytest.mark.parametrize("url", ["mysql://host/name", "nonsense", "", "oracle://host"])
def test_another_url_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"PostgreSQL or SQLite|cannot be read"):
        open_database(url)


def test_a_password_is_in_no_text() -> None:
    assert "hunter2" not in repr(open_database("postgresql://user:hunter2@host/name"))
    with pytest.raises(ConfigurationError) as caught:
        open_database("mysql://user:hunter2@host/name")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite:///:memory:", "sqlite://", "postgresql://host/name"])
def test_what_is_no_file_has_none(url: str) -> None:
    assert sqlite_file(url) is None


async def test_sqlite_keeps_every_commit_on_disk_and_waits_for_locks(sqlite_url: str) -> None:
    engine = open_database(sqlite_url)
    async with transaction(engine) as connection:
        found = {
            pragma: (await connection.execute(text(f"PRAGMA {pragma}"))).scalar_one()
            for pragma in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    await engine.dispose()
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 5000}


async def test_a_database_in_memory_works() -> None:
    engine = open_database("sqlite:///:memory:")
    async with transaction(engine) as connection:
        await connection.run_sync(metadata.create_all)
    rows = things(2)
    await insert(engine, rows)
    assert len(await find(engine, [row[0] for row in rows])) == 2
    await engine.dispose()


async def test_a_second_process_may_look_into_an_sqlite_file_but_not_write(sqlite_url: str) -> None:
    engine, looking = open_database(sqlite_url), open_database(sqlite_url, read_only=True)
    try:
        async with transaction(engine) as connection:
            await connection.execute(text("CREATE TABLE t (a INTEGER)"))
        async with reader(looking).connect() as connection:
            assert (await connection.execute(text("SELECT count(*) FROM t"))).scalar_one() == 0
        with pytest.raises(SQLAlchemyError, match="readonly"):
            async with reader(looking).connect() as connection:
                await connection.execute(text("INSERT INTO t VALUES (1)"))
    finally:
        await looking.dispose()
        await engine.dispose()


async def test_a_cancelled_commit_to_sqlite_is_over_before_the_next_transaction_begins(sqlite_url: str) -> None:
    engine = open_database(sqlite_url)
    async with transaction(engine) as connection:
        await connection.execute(text("CREATE TABLE t (a INTEGER)"))

    async def write(number: int) -> None:
        async with transaction(engine) as connection:
            await connection.execute(text("INSERT INTO t VALUES (:a)"), {"a": number})

    for number in range(50):
        task = asyncio.create_task(write(number))
        for _ in range(number % 10):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await write(1000 + number)
    async with transaction(engine) as connection:
        kept = (await connection.execute(text("SELECT count(*) FROM t WHERE a >= 1000"))).scalar_one()
    await engine.dispose()
    assert kept == 50


def test_one_process_at_a_time_holds_an_sqlite_file(tmp_path: Path) -> None:
    first, second = FileLock(str(tmp_path / "a.db")), FileLock(str(tmp_path / "a.db"))
    first.acquire()
    with pytest.raises(DatabaseInUseError, match="PostgreSQL"):
        second.acquire()
    first.release()
    first.release()
    second.acquire()
    second.release()


# The store's clock


async def test_the_store_tells_the_servers_time_and_a_local_jump_changes_nothing(engine: AsyncEngine) -> None:
    clock = ManualClock()
    store_clock = StoreClock(engine, clock)
    await store_clock.calibrate()
    before = store_clock.now()
    clock.advance(5)
    assert (store_clock.now() - before).total_seconds() == 5
    if engine.dialect.name == "postgresql":
        async with transaction(engine) as connection:
            server: datetime = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
        assert before <= server
        assert before != clock.now()
    else:
        assert store_clock.now() == clock.now()


@pytest.mark.postgres
async def test_the_server_is_asked_again_when_the_answer_is_old(pg_url: str) -> None:
    engine = open_database(pg_url)
    try:
        clock = ManualClock()
        store_clock = StoreClock(engine, clock)
        await store_clock.calibrate()
        clock.advance(29)
        ahead = store_clock.now()
        await store_clock.calibrate_if_old()
        assert store_clock.now() == ahead
        clock.advance(2)
        await store_clock.calibrate_if_old()
        assert store_clock.now() < ahead
    finally:
        await engine.dispose()
