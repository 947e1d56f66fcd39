"""How people step into sagas that are stuck, or that they want to stop."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

from coordinator.app import App
from coordinator.decision import Acted, Resolution, Verb
from coordinator.engine import Engine
from coordinator.instance import Instance
from coordinator.node import make_engine, open_bus, open_schema
from coordinator.settings import Settings
from coordinator.store import Store
from coordinator.versions import Versions
from events.clock import SystemClock
from events.embedded import EmbeddedBus
from events.errors import ConfigurationError
from events.ids import TimeOrderedIds


class Operator:
    """Acts on sagas of one application, beside its running processes.

    Args:
        engine: writes what follows; it need not be started.
        store: where the sagas are.
    """

    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine = engine
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
        if not why.strip() or not by.strip():
            raise ConfigurationError("say who does this, and why: both are kept in the saga's history")
        found = await self.find(reference)
        await self.store.clock.calibrate()
        now = self.store.clock.now()
        return await self._engine.act(found.id, Acted(verb, by, why, now, step, until, revision, resolution, data))


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
        yield Operator(engine, store)
