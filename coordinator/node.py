"""One running process: the bus, the database, and what an application runs on them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dishka import AsyncContainer, make_async_container
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncEngine

from coordinator import schema
from coordinator.app import App
from coordinator.engine import Engine
from coordinator.lifecycles.service import Lifecycles
from coordinator.lifecycles.store import LifecycleStore
from coordinator.lifecycles.timers import LifecycleTimers
from coordinator.settings import Settings
from coordinator.store import Store
from coordinator.versions import Versions
from events.bus import Bus, Queue
from events.clock import Clock, SystemClock
from events.database import open_database, ping, sqlite_file
from events.embedded import EmbeddedBus
from events.errors import ConfigurationError
from events.failpoints import failpoint
from events.ids import Ids, Random, TimeOrderedIds, system_random
from events.message import Command
from events.outbox import Outbox
from events.publisher import Publisher
from events.rabbitmq import RabbitMQBus
from events.relay import Relay
from events.sqlite import FileLock
from handlers.broker_letters import BrokerLetters
from handlers.fence import Fence
from handlers.group import HandlerGroup
from handlers.keys import KeyLocks
from handlers.retries import Retries
from handlers.tools import Tools

logger = logging.getLogger(__name__)

_PING_TIMEOUT = 2.0


class Node:
    """Runs an application, or parts of it, while its `async with` block lasts.

        async with Node(app, Settings()) as node:
            await node.publisher.publish(OrderPlaced(...))

    Args:
        app: the application.
        settings: where its servers are.
        coordinator: run its sagas, and the deadlines of its life cycles, here.
        handlers: run its handlers here; False for none, or the names of some.
        clock, ids, random: ports, the system's own by default.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        *,
        coordinator: bool = True,
        handlers: bool | frozenset[str] = True,
        clock: Clock | None = None,
        ids: Ids | None = None,
        random: Random | None = None,
    ) -> None:
        self._app = app
        self._settings = settings
        self._clock = clock or SystemClock()
        self._ids = ids or TimeOrderedIds()
        self._random = random or system_random()
        self._with_coordinator = coordinator and bool(app.definitions)
        self._with_timers = coordinator and bool(app.lifecycles)
        self._handlers = [h for h in app.handlers if handlers is True or (handlers and h.name in handlers)]
        if handlers is not True and handlers and (strange := handlers - {h.name for h in app.handlers}):
            raise ConfigurationError(f"{app.name} has no handler called {', '.join(sorted(strange))}")
        self._stack = AsyncExitStack()
        self._watched: list[Callable[[], frozenset[str]]] = []
        self._group: HandlerGroup | None = None
        self.engine: AsyncEngine
        self.bus: Bus
        self.store: Store
        self.lifecycles: Lifecycles
        self.publisher: Publisher
        self.relay: Relay

    async def __aenter__(self) -> Self:
        """Open everything; returns when messages are being consumed."""
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop taking work, let handlers finish, hand back the rest, close."""
        await self._stack.aclose()

    async def _open(self) -> None:
        enter = self._stack.enter_async_context
        self.engine = await enter(open_schema(self._settings, self._app.tables))
        self.bus, self.relay = await enter(
            open_bus(
                self._settings,
                self.engine,
                application=self._app.name,
                queues=self._queues,
                clock=self._clock,
                ids=self._ids,
                random=self._random,
            )
        )
        await failpoint("node.declared")
        self.store = Store(self.engine, self._clock)
        if self._with_coordinator:
            await register_versions(self._app, self.store)
        self.publisher = Publisher(
            self.bus, self._app.source, clock=self._clock, ids=self._ids, limits=self._settings.limits
        )
        outbox: Outbox = self.bus if isinstance(self.bus, EmbeddedBus) else self.relay
        self.lifecycles = make_lifecycles(
            self._app,
            self._settings,
            LifecycleStore(self.engine, self._clock),
            outbox=outbox,
            clock=self._clock,
            ids=self._ids,
        )
        if self._app.lifecycles:
            await self.lifecycles.store.clock.calibrate()
        engine = self._make_engine(outbox)
        group = self._group = self._make_group(outbox)
        self._watched.append(lambda: self.relay.failing)
        if group is not None:
            self._stack.push_async_callback(group.stop, self._settings.grace)
            self._watched.append(lambda: group.failing)
            await group.start()
        letters = BrokerLetters(
            self.engine,
            bus=self.bus,
            outbox=outbox,
            clock=self._clock,
            ids=self._ids,
            limits=self._settings.limits,
        )
        self._stack.push_async_callback(letters.stop)
        self._watched.append(lambda: letters.failing)
        await letters.start()
        if engine is not None:
            self._stack.push_async_callback(engine.stop)
            self._watched.append(lambda: engine.failing)
            await engine.start()
        if self._with_timers:
            timers = LifecycleTimers(self.lifecycles, self._clock)
            self._stack.push_async_callback(timers.stop)
            self._watched.append(lambda: timers.failing)
            await timers.start()

    async def problems(self) -> list[str]:
        """Return what keeps this process from its work, in sentences for people; nothing if it is ready."""
        found = [f"{name} has failed and is started again" for look in self._watched for name in sorted(look())]
        if self.bus.problem:
            found.append(self.bus.problem)
        try:
            async with asyncio.timeout(_PING_TIMEOUT):
                await ping(self.engine)
        except Exception as error:  # noqa: BLE001  # whatever it is, the database is of no use at the moment
            found.append(f"the database does not answer: {type(error).__name__}")
        return found

    @property
    def overdue(self) -> float:
        """For how many seconds a handler has gone on that was cancelled; 0 if there is none."""
        return self._group.overdue if self._group else 0

    def handler_states(self) -> dict[str, Any]:
        """Return how each handler of this process is."""
        return self._group.states() if self._group else {}

    @property
    def _queues(self) -> list[Queue]:
        """What is consumed here."""
        queues = [handler.queue for handler in self._handlers]
        if self._with_coordinator:
            queues += self._app.coordinated.queues
        return queues

    def _make_engine(self, outbox: Outbox) -> Engine | None:
        if not self._with_coordinator:
            return None
        return make_engine(
            self._app, self._settings, self.store, bus=self.bus, outbox=outbox, clock=self._clock, ids=self._ids
        )

    def _make_group(self, outbox: Outbox) -> HandlerGroup | None:
        if not self._handlers:
            return None
        container: AsyncContainer | None = None
        if self._app.resources:
            container = make_async_container(*self._app.resources)
            self._stack.push_async_callback(container.close)
        tools = Tools(
            engine=self.engine,
            bus=self.bus,
            outbox=outbox,
            container=container,
            clock=self._clock,
            ids=self._ids,
            random=self._random,
            limits=self._settings.limits,
            fence=Fence(
                frozenset(h.message.message_type for h in self._app.handlers if issubclass(h.message, Command))
            ),
            retries=Retries(self.engine, clock=self._clock, ids=self._ids),
            keys=KeyLocks(self.engine, clock=self._clock, random=self._random),
        )
        return HandlerGroup(self._handlers, registry=self._app.registry, source=self._app.source, tools=tools)


def make_engine(
    app: App, settings: Settings, store: Store, *, bus: Bus, outbox: Outbox, clock: Clock, ids: Ids
) -> Engine:
    """Return the engine of an application's coordinator; all of them speak with one voice."""
    return Engine(
        app.coordinated,
        source=f"{app.source}/coordinator",
        engine=store.engine,
        store=store,
        bus=bus,
        outbox=outbox,
        clock=clock,
        ids=ids,
        limits=settings.limits,
    )


async def register_versions(app: App, store: Store) -> None:
    """Keep what the sagas of an application are like, and say which instances it will leave alone.

    Raises:
        ChangedVersionError: a saga was changed under an old version number.
    """
    await store.clock.calibrate()
    versions = Versions(store.engine)
    await versions.register(app.definitions, store.clock.now())
    known = {(each.name, each.version) for each in app.definitions}
    names = {name for name, _ in known}
    for saga, version in sorted(await versions.in_flight() - known):
        if saga in names:
            logger.warning(
                "instances of saga %s version %d are in flight, and left alone: this application does not have it",
                saga,
                version,
                extra={"action": "saga.unknown_version", "saga": saga, "version": version},
            )


def make_lifecycles(
    app: App, settings: Settings, store: LifecycleStore, *, outbox: Outbox, clock: Clock, ids: Ids
) -> Lifecycles:
    """Return the entities of an application; all of its processes speak with one voice."""
    return Lifecycles(
        app.lifecycles,
        source=f"{app.source}/lifecycles",
        store=store,
        outbox=outbox,
        clock=clock,
        ids=ids,
        limits=settings.limits,
    )


@asynccontextmanager
async def open_schema(settings: Settings, tables: Sequence[MetaData] = ()) -> AsyncIterator[AsyncEngine]:
    """Open the database with its schema up to date, and alone where it is an SQLite file.

    Raises:
        DatabaseInUseError: another process works on the SQLite file.
        ConfigurationError: the schema is old, and the settings say not to touch it.
    """
    url = settings.database_url.get_secret_value()
    engine = open_database(url, pool_size=settings.pool_size)
    file = sqlite_file(url)
    lock = FileLock(file) if file else None
    if lock:
        lock.acquire()
    try:
        if settings.migrate:
            await schema.upgrade(engine, tables)
        else:
            await schema.check(engine)
            await schema.create_missing(engine, tables)
        yield engine
    finally:
        await engine.dispose()
        if lock:
            lock.release()


@asynccontextmanager
async def open_reading(settings: Settings) -> AsyncIterator[AsyncEngine]:
    """Open the database to look at it; an SQLite file may be in use by another process meanwhile.

    Raises:
        ConfigurationError: there is no such file.
    """
    url = settings.database_url.get_secret_value()
    _refuse_missing(sqlite_file(url))
    engine = open_database(url, read_only=True)
    try:
        yield engine
    finally:
        await engine.dispose()


def _refuse_missing(file: str | None) -> None:
    if file and not Path(file).exists():
        raise ConfigurationError(
            f"there is no database file {file} yet; start the application, or set COORDINATOR_DATABASE_URL"
        )


@asynccontextmanager
async def open_bus(
    settings: Settings,
    engine: AsyncEngine,
    *,
    application: str | None = None,
    queues: Sequence[Queue] = (),
    clock: Clock | None = None,
    ids: Ids | None = None,
    random: Random | None = None,
) -> AsyncIterator[tuple[Bus, Relay]]:
    """Open the bus, and run a relay from the database's outbox to it.

    Who consumes names the `application` whose queues are declared. `queues` are declared before anything is relayed: an
    event that is published sooner would pass them by.

    Raises:
        ConfigurationError: the embedded bus and PostgreSQL do not go together.
    """
    clock, ids, random = clock or SystemClock(), ids or TimeOrderedIds(), random or system_random()
    bus: Bus
    if not settings.embedded:
        url = settings.broker_url.get_secret_value()
        bus = RabbitMQBus(
            url,
            read_url=settings.read_broker_url,
            namespace=settings.namespace,
            application=application,
            clock=clock,
            ids=ids,
        )
    elif engine.dialect.name == "sqlite":
        bus = EmbeddedBus(engine, clock=clock, limits=settings.limits)
    else:
        raise ConfigurationError(
            "the embedded bus lives in an SQLite file; with PostgreSQL set COORDINATOR_BROKER_URL to a RabbitMQ server"
        )
    relay = Relay(engine, bus, clock=clock, ids=ids, random=random, limits=settings.limits)
    await bus.open()
    try:
        await bus.declare(queues)
        await relay.start()
        try:
            yield bus, relay
        finally:
            await relay.stop()
    finally:
        await bus.close()
