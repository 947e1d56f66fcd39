"""Opening the entities of an application from outside its processes: a web service, a script, the command line."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from coordinator.app import App
from coordinator.lifecycles.service import Lifecycles
from coordinator.lifecycles.store import LifecycleStore
from coordinator.node import make_lifecycles, open_bus, open_schema
from coordinator.settings import Settings
from events.clock import SystemClock
from events.embedded import EmbeddedBus
from events.ids import TimeOrderedIds


@asynccontextmanager
async def open_lifecycles(app: App, settings: Settings) -> AsyncIterator[Lifecycles]:
    """Open the servers of an application to act on its entities; its processes may run, except on an SQLite file.

    Within a process of the application use `Node.lifecycles`.

    Raises:
        DatabaseInUseError: another process works on the SQLite file.
    """
    clock, ids = SystemClock(), TimeOrderedIds()
    async with open_schema(settings, app.tables) as database, open_bus(settings, database) as (bus, relay):
        outbox = bus if isinstance(bus, EmbeddedBus) else relay
        store = LifecycleStore(database, clock)
        await store.clock.calibrate()
        yield make_lifecycles(app, settings, store, outbox=outbox, clock=clock, ids=ids)
