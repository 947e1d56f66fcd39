"""The schema: made once by whoever comes first, and the same whether migrated to or made of the models."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import (
    Column,
    Connection,
    Integer,
    MetaData,
    Table,
    TableClause,
    Text,
    column,
    inspect,
    select,
    table,
    text,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from coordinator import schema
from coordinator.chain import COLUMNS, GENESIS, seal
from coordinator.tables import saga_history, saga_instance
from events.clock import SystemClock
from events.database import open_database, transaction
from events.embedded import EmbeddedBus
from events.errors import ConfigurationError
from events.tables import Json, JsonText

TASKS = 6

ours = {
    "alembic_version",
    "dead_letter",
    "dead_letter_change",
    "handler_change",
    "handler_process",
    "handler_setting",
    "inbox",
    "lifecycle_delegation",
    "lifecycle_entity",
    "lifecycle_history",
    "outbox",
    "parked_event",
    "retry",
    "saga_history",
    "saga_instance",
    "saga_item",
    "saga_lock",
    "saga_version",
    "saga_wait",
}
shop = MetaData()
products = Table("product", shop, Column("id", Integer, primary_key=True), Column("name", Text, nullable=False))

MOMENT = datetime(2026, 3, 29, 2, 30, 0, 123457, tzinfo=UTC)


def history_with(json: Any) -> TableClause:
    """The table of history, whose JSON has this type."""
    columns = {each.name: json if isinstance(each.type, JsonText) else each.type for each in saga_history.c}
    return table("saga_history", *(column(name, kind) for name, kind in columns.items()))


old_history, raw_history = history_with(Json), history_with(Text)


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    opened = open_database(database_url)
    yield opened
    await opened.dispose()


@pytest.fixture
async def engines(pg_url: str) -> AsyncIterator[list[AsyncEngine]]:
    """One database, as several processes open it."""
    async with AsyncExitStack() as stack:
        opened = [open_database(pg_url, pool_size=1) for _ in range(TASKS)]
        for each in opened:
            stack.push_async_callback(each.dispose)
        yield opened


async def table_names(engine: AsyncEngine) -> set[str]:
    async with engine.connect() as connection:
        return set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))


async def catalogue(engine: AsyncEngine, postgres: str, sqlite: str) -> set[tuple[Any, ...]]:
    """Return what a query of the database's own catalogue says of our tables."""
    async with engine.connect() as connection:
        rows = await connection.execute(text(postgres if engine.dialect.name == "postgresql" else sqlite))
        return {tuple(row) for row in rows if row[0] in ours - {"alembic_version"}}


async def make_of_models(engine: AsyncEngine) -> None:
    """Replace what the migrations have made by what the models say."""
    async with transaction(engine) as connection:
        await connection.run_sync(schema.metadata.drop_all)
        await connection.run_sync(schema.metadata.create_all)


def differences(connection: Connection) -> list[Any]:
    def is_ours(_object: Any, name: str | None, kind: str, *_: Any) -> bool:
        return not (kind == "table" and (name or "").startswith("embedded_"))

    context = MigrationContext.configure(
        connection, opts={"compare_type": True, "compare_server_default": True, "include_object": is_ours}
    )
    found: list[Any] = compare_metadata(context, schema.metadata)
    return found


async def test_an_empty_database_is_brought_up_to_date(engine: AsyncEngine) -> None:
    assert await schema.current(engine) is None
    await schema.upgrade(engine, [shop])
    assert await schema.current(engine) == schema.head() != ""
    assert await table_names(engine) == ours | {"product"}
    await schema.check(engine)


async def test_a_second_upgrade_changes_nothing(engine: AsyncEngine) -> None:
    await schema.upgrade(engine, [shop])
    async with transaction(engine) as connection:
        await connection.execute(products.insert().values(name="kept"))
    await schema.upgrade(engine, [shop])
    async with transaction(engine) as connection:
        assert (await connection.execute(products.select())).one().name == "kept"
        assert len((await connection.execute(text("SELECT * FROM alembic_version"))).all()) == 1
    await schema.check(engine)


async def test_an_upgrade_that_fails_leaves_nothing_behind(engine: AsyncEngine) -> None:
    taken = MetaData()
    Table("saga_instance_view", taken, Column("id", Integer, primary_key=True), prefixes=["NONSENSE"])
    with pytest.raises(SQLAlchemyError):
        await schema.upgrade(engine, [shop, taken])
    assert await schema.current(engine) is None
    assert await table_names(engine) == set()
    await schema.upgrade(engine)
    await schema.check(engine)


async def test_many_tasks_upgrade_one_engine_at_once(engine: AsyncEngine) -> None:
    await asyncio.gather(*(schema.upgrade(engine, [shop]) for _ in range(TASKS)))
    assert await table_names(engine) == ours | {"product"}


async def test_many_processes_upgrade_one_database_at_once(engines: list[AsyncEngine]) -> None:
    await asyncio.gather(*(schema.upgrade(engine, [shop]) for engine in engines))
    for engine in engines:
        await schema.check(engine)
    assert await table_names(engines[0]) == ours | {"product"}


async def test_many_processes_create_an_applications_tables_at_once(engines: list[AsyncEngine]) -> None:
    await schema.upgrade(engines[0])
    await asyncio.gather(*(schema.create_missing(engine, [shop]) for engine in engines))
    async with transaction(engines[0]) as connection:
        await connection.execute(products.insert().values(name="kept"))
    await asyncio.gather(*(schema.create_missing(engine, [shop]) for engine in engines))
    async with transaction(engines[-1]) as connection:
        assert (await connection.execute(products.select())).one().name == "kept"


async def test_an_applications_tables_are_created_where_they_are_missing(engine: AsyncEngine) -> None:
    other = MetaData()
    Table("supplier", other, Column("id", Integer, primary_key=True))
    await schema.upgrade(engine)
    await schema.create_missing(engine, [])
    assert await table_names(engine) == ours
    await schema.create_missing(engine, [shop])
    await schema.create_missing(engine, [shop, other])
    assert await table_names(engine) == ours | {"product", "supplier"}
    assert await schema.current(engine) == schema.head()


async def test_an_empty_database_is_refused_with_what_to_run(engine: AsyncEngine) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"at nothing, .* needs {schema.head()}; run `coordinator db upgrade`"
    ):
        await schema.check(engine)
    assert await table_names(engine) == set()


async def test_a_database_at_an_older_revision_is_refused_with_what_to_run(engine: AsyncEngine) -> None:
    await schema.upgrade(engine)
    async with transaction(engine) as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '0004'"))
    assert await schema.current(engine) == "0004"
    with pytest.raises(ConfigurationError, match=r"at 0004, .*; run `coordinator db upgrade`"):
        await schema.check(engine)


async def test_a_database_that_newer_code_has_made_is_left_alone(engine: AsyncEngine) -> None:
    """After a rollback of the code an upgrade would be no way out, and is not named as one."""
    await schema.upgrade(engine)
    async with transaction(engine) as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for refused in (schema.check, schema.upgrade):
        with pytest.raises(
            ConfigurationError, match=r"at 9999, which this version does not know: it needs \d+; run the"
        ):
            await refused(engine)
    assert await schema.current(engine) == "9999"


async def test_the_migrations_make_the_tables_of_the_models(engine: AsyncEngine) -> None:
    await schema.upgrade(engine)
    if engine.dialect.name == "sqlite":  # it keeps its queues in the same file
        bus = EmbeddedBus(engine, clock=SystemClock())
        await bus.open()
        await bus.close()
    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_the_migrations_make_the_indexes_of_the_models(engine: AsyncEngine) -> None:
    """Word for word: Alembic does not compare the conditions of partial indexes."""
    indexes = (
        "SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = 'public'",
        "SELECT tbl_name, name, sql FROM sqlite_master WHERE type = 'index'",
    )
    await schema.upgrade(engine)
    migrated = await catalogue(engine, *indexes)
    await make_of_models(engine)
    assert migrated == await catalogue(engine, *indexes)
    assert {row[0] for row in migrated} == ours - {"alembic_version"}


async def test_the_migrations_make_tables_with_the_storage_options_of_the_models(engines: list[AsyncEngine]) -> None:
    options = "SELECT relname, array_to_string(reloptions, ',') FROM pg_class WHERE relkind = 'r'"
    await schema.upgrade(engines[0])
    migrated = await catalogue(engines[0], options, "")
    await make_of_models(engines[0])
    assert migrated == await catalogue(engines[0], options, "")


async def test_an_old_history_is_sealed(engine: AsyncEngine) -> None:
    """With the hashes that its rows would have been written with today."""
    histories = {uuid4(): 3, uuid4(): 1}
    async with transaction(engine) as connection:
        await connection.run_sync(lambda sync: command.upgrade(schema._config(sync), "0002"))
        for saga_id, count in histories.items():
            about = {"id": saga_id, "saga": "trip", "version": 1, "key": str(saga_id), "status": "running", "state": {}}
            about |= {"steps": {}, "revision": count, "created_at": MOMENT, "updated_at": MOMENT}
            await connection.execute(saga_instance.insert().values(about))
            for revision in range(1, count + 1):
                happened = {"saga_id": saga_id, "revision": revision, "kind": "reply", "at": MOMENT, "attempt": 1}
                happened |= {"status": "running", "change": {"state": {"amount": 1e20, "é": None}}, "sent": []}
                await connection.execute(old_history.insert().values(happened))
    await schema.upgrade(engine)
    async with transaction(engine) as connection:
        for saga_id, count in histories.items():
            wanted = select(*(raw_history.c[name] for name in (*COLUMNS, "hash"))).order_by(raw_history.c.revision)
            rows = (await connection.execute(wanted.where(raw_history.c.saga_id == saga_id))).all()
            head = GENESIS
            for row in rows:
                head = seal(head, row[:-1])
                assert row.hash == head
            assert len(rows) == count
            instance = await connection.execute(saga_instance.select().where(saga_instance.c.id == saga_id))
            assert instance.one().head == head
        if engine.dialect.name == "sqlite":
            assert (await connection.execute(text("PRAGMA foreign_keys"))).scalar_one() == 1


async def test_an_upgrade_of_an_sqlite_file_that_leaves_a_row_without_its_parent_fails(sqlite_url: str) -> None:
    engine = open_database(sqlite_url)
    await schema.upgrade(engine)
    lost = raw_history.insert().values(saga_id=uuid4(), revision=1, kind="x", at=MOMENT, status="x", hash=b"")
    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        async with schema._locked(engine) as connection:
            await connection.execute(lost.values(change="{}", sent="[]"))
    async with transaction(engine) as connection:
        assert (await connection.execute(raw_history.select())).all() == []
        assert (await connection.execute(text("PRAGMA foreign_keys"))).scalar_one() == 1
    await engine.dispose()
