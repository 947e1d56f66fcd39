"""How people step into sagas that are stuck, or that they want to stop."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

from coordinator.app import App
from coordinator.bulk_acts import BulkAct
from coordinator.decision import Acted, Resolution, Verb
from coordinator.engine import Engine
from coordinator.instance import Instance
from coordinator.migrator import Migrator, Report
from coordinator.node import make_engine, open_bus, open_schema
from coordinator.search import Query
from coordinator.settings import Settings
from coordinator.store import Store
from coordinator.versions import Versions
from events.clock import Clock, SystemClock
from events.embedded import EmbeddedBus
from events.errors import ConfigurationError
from events.ids import TimeOrderedIds


class Operator:
    """Acts on sagas of one application, beside its running processes.

    Args:
        engine: writes what follows; it need not be started.
        store: where the sagas are.
        clock: paces what is done to many.
    """

    def __init__(self, engine: Engine, store: Store, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self.store = store

    async def find(self, reference: UUID | str) -> Instance:
        """Return the saga with this id or business key.

        Raises:
            ConfigurationError: there is none, or there are several.
        """
        found = await self.store.find(str(reference))
        if not found:
            raise ConfigurationError(f"there is no saga with the id or business key {str(reference)!r}")
        if len(found) > 1:
            names = ", ".join(f"{each.saga} {each.id}" for each in found)
            raise ConfigurationError(f"several sagas have the business key {str(reference)!r}: {names}; give the id")
        return found[0]

    async def act(
        self,
        reference: UUID | str,
        verb: Verb,
        *,
        by: str,
        why: str,
        step: str | None = None,
        until: datetime | None = None,
        revision: int | None = None,
        resolution: Resolution | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> Instance:
        """Do something to a saga, and return it as it is then.

        Args:
            reference: its id or business key.
            verb: what to do.
            by: who does it.
            why: the reason, for the history.
            step: the step that is meant, for a verb that needs one; of a deadline, None is the saga's own.
            until: the new deadline, to move one.
            revision: the revision that was looked at.
            resolution: how a step has ended, to resolve it.
            data: what its handler would have said, as JSON data.

        Raises:
            ConfigurationError: there is no such saga, or no reason is given.
            NotPossibleError: it makes no sense where the saga stands, or the saga has moved on; nothing is changed.
        """
        _refuse_anonymous(by, why)
        found = await self.find(reference)
        await self.store.clock.calibrate()
        now = self.store.clock.now()
        return await self._engine.act(found.id, Acted(verb, by, why, now, step, until, revision, resolution, data))

    def act_on(
        self,
        query: Query,
        verb: Verb,
        *,
        by: str,
        why: str,
        step: str | None = None,
        until: datetime | None = None,
        resolution: Resolution | None = None,
        data: Mapping[str, Any] | None = None,
        rate: float | None = None,
        dry_run: bool = False,
    ) -> BulkAct:
        """Return the act on all sagas that `query` means, to be iterated over.

        The arguments are those of `act`; `rate` is how many sagas a second there are at most, None for as fast as it
        goes. With `dry_run` it says what would be done, and changes nothing.

        Raises:
            ConfigurationError: no reason is given, or the query means all sagas there are.
        """
        _refuse_anonymous(by, why)
        act = Acted(verb, by, why, self.store.clock.now(), step, until, None, resolution, data)
        return BulkAct(self._engine, self.store, self._clock, query=query, act=act, rate=rate, dry_run=dry_run)

    async def migrate(self, saga: str, to: int, *, by: str, why: str, limit: int | None = None) -> Report:
        """Take all instances of a saga that have not ended over into another version; see `Migrator.migrate`.

        Raises:
            ConfigurationError: the application has no such version, or no reason is given.
        """
        _refuse_anonymous(by, why)
        await self.store.clock.calibrate()
        migrator = Migrator(self._engine.sagas, self.store)
        return await migrator.migrate(self._engine, saga, to, by=by, why=why, limit=limit)


def _refuse_anonymous(by: str, why: str) -> None:
    if not why.strip() or not by.strip():
        raise ConfigurationError("say who does this, and why: both are kept in the saga's history")


@asynccontextmanager
async def open_operator(app: App, settings: Settings) -> AsyncIterator[Operator]:
    """Open the servers of an application to act on its sagas; its processes may run, except on an SQLite file.

    Raises:
        DatabaseInUseError: another process works on the SQLite file.
        ChangedVersionError: a saga is not what its instances were begun with.
    """
    clock, ids = SystemClock(), TimeOrderedIds()
    async with open_schema(settings, app.tables) as database, open_bus(settings, database) as (bus, relay):
        store = Store(database, clock)
        outbox = bus if isinstance(bus, EmbeddedBus) else relay
        engine = make_engine(app, settings, store, bus=bus, outbox=outbox, clock=clock, ids=ids)
        await Versions(database).check(app.definitions)
        yield Operator(engine, store, clock)
