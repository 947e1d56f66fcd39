"""The database schema: Alembic migrations, run by us under a lock."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator import tables as _coordinator_tables
from coordinator.lifecycles import tables as _lifecycle_tables
from events.database import transaction
from events.errors import ConfigurationError
from events.failpoints import failpoint
from events.sqlite import check_foreign_keys, without_foreign_keys
from events.tables import metadata
from handlers import tables as _handler_tables

__all__ = ["check", "create_missing", "current", "head", "metadata", "upgrade"]

_LOCK = 0x5A6AC00D  # any number that nobody else uses for pg_advisory_lock
_parts = (_coordinator_tables, _handler_tables, _lifecycle_tables)  # importing them fills the metadata


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def head() -> str:
    """Return the revision that this code needs."""
    return ScriptDirectory.from_config(_config()).get_current_head() or ""


async def current(engine: AsyncEngine) -> str | None:
    """Return the revision of the database, None for an empty one."""
    async with engine.connect() as connection:
        return await connection.run_sync(_revision)


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _refuse_newer(found: str | None) -> None:
    """Refuse a schema that only newer code knows: a process of today could spoil what that has written.

    Raises:
        ConfigurationError: it is one.
    """
    known = {each.revision for each in ScriptDirectory.from_config(_config()).walk_revisions()}
    if found is not None and found not in known:
        raise ConfigurationError(
            f"the database schema is at {found}, which this version does not know: it needs {head()}; run the newer"
            " version that has made it, or restore the database from before"
        )


async def upgrade(engine: AsyncEngine, tables: Iterable[MetaData] = ()) -> None:
    """Bring the schema up to date in one transaction, and create what is missing of an application's `tables`.

    Several processes may try at once; one does it, the others wait and find it done.

    Raises:
        ConfigurationError: a newer version has made the schema.
    """
    async with _locked(engine) as connection:
        _refuse_newer(await connection.run_sync(_revision))
        await connection.run_sync(lambda sync: command.upgrade(_config(sync), "head"))
        await _create(connection, tables)
        await failpoint("schema.before_commit")


async def create_missing(engine: AsyncEngine, tables: Iterable[MetaData]) -> None:
    """Create what is missing of an application's own tables."""
    async with _locked(engine) as connection:
        await _create(connection, tables)


async def _create(connection: AsyncConnection, tables: Iterable[MetaData]) -> None:
    for each in tables:
        await connection.run_sync(each.create_all)


@asynccontextmanager
async def _locked(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Begin a transaction that changes tables: "create if missing" of two processes would collide without a lock."""
    if engine.dialect.name == "postgresql":
        async with transaction(engine) as connection:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            yield connection
        return
    async with engine.connect() as connection, without_foreign_keys(connection), connection.begin():
        yield connection
        await check_foreign_keys(connection)


async def check(engine: AsyncEngine) -> None:
    """Refuse a database whose schema is not the one that this code needs.

    Raises:
        ConfigurationError: it is not; the text says what to run.
    """
    found = await current(engine)
    _refuse_newer(found)
    if found != head():
        raise ConfigurationError(
            f"the database schema is at {found or 'nothing'}, this version needs {head()}; run `coordinator db upgrade`"
        )
