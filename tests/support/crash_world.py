"""One case of the crash matrix: a store of its own, processes that are started again when they end, orders, checks."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlsplit
from uuid import UUID

import pika
import psycopg
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from coordinator.batch import Sagas
from coordinator.engine import coordinator_queues
from coordinator.node import open_bus, open_schema
from coordinator.settings import Settings
from events import ServiceOutbox
from events.ids import TimeOrderedIds
from tests.support.base import Postgres, RabbitMQ
from tests.support.crash_app import app
from tests.support.ledger_app import OrderPlaced
from tests.support.processes import ForkedProcess

APP = "tests.support.crash_app:app"
AN_HOUR = 3600.0
PATIENCE = 120.0  # seconds for a case
QUIET = 20.0  # seconds in which nothing happens any more: several leases of the crash app
LOOK_EVERY = 0.2

Rows = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Script:
    """What happens in a case.

    Attributes:
        crash_at: see CRASH_AT of the crash app.
        numbers: the orders; see the ledger app.
        processes: how many run side by side.
        timeout: seconds for each step. An hour, so that no command is sent again that hides what was lost.
        plant: a bug.
        overdue: the coordinator runs alone until all orders have missed their deadline.
        stop_at: how many rows of history there are when all processes are asked to stop; 0 for never.
        prepared: the schema and the queues are there before the first process.
        poison: the number of an order that kills each process that decides on it.
    """

    crash_at: str = ""
    numbers: Sequence[int] = ()
    processes: int = 1
    timeout: float = AN_HOUR
    plant: str = ""
    overdue: bool = False
    stop_at: int = 0
    prepared: bool = True
    poison: int | None = None


@dataclass
class Ran:
    """How a case went."""

    problem: str | None = None
    log: str = ""
    restarts: int = 0


class Place(Protocol):
    """Servers, or files, that no other case uses."""

    environment: Mapping[str, str]
    settings: Settings
    outbox_url: str
    xids: bool

    def ask(self, statement: str) -> Rows: ...

    def ask_outside(self, statement: str) -> Rows: ...

    def queued(self) -> int:
        """Count the messages that wait in queues."""


class ServerPlace:
    """RabbitMQ and PostgreSQL."""

    xids = True

    def __init__(self, stack: ExitStack, rabbitmq: RabbitMQ, postgres: Postgres) -> None:
        url = stack.enter_context(postgres.database())
        self._broker = stack.enter_context(rabbitmq.vhost())
        self._rabbitmq = rabbitmq
        self._connection = stack.enter_context(
            psycopg.connect(url.replace("postgresql+asyncpg", "postgresql"), autocommit=True)
        )
        self.settings = Settings.model_validate({"broker_url": self._broker, "database_url": url, "pool_size": 4})
        self.outbox_url = url.replace("postgresql+asyncpg", "postgresql+psycopg")
        self.environment = {
            "COORDINATOR_BROKER_URL": self._broker,
            "COORDINATOR_DATABASE_URL": url,
            "COORDINATOR_POOL_SIZE": "4",
            "LEDGER_URL": url,
        }

    def ask(self, statement: str) -> Rows:
        return self._connection.execute(statement.encode()).fetchall()

    ask_outside = ask

    def queued(self) -> int:
        vhost = urlsplit(self._broker).path[1:]
        queues: Any = self._rabbitmq.manage("GET", f"queues/{quote(vhost, safe='')}?columns=name")
        with closing(pika.BlockingConnection(pika.URLParameters(self._broker))) as connection:
            channel = connection.channel()
            return sum(channel.queue_declare(each["name"], passive=True).method.message_count for each in queues)


class FilePlace:
    """The embedded bus in an SQLite file; the third party has another file."""

    xids = False

    def __init__(self, folder: Path) -> None:
        self._file, self._ledger = folder / "coordinator.db", folder / "ledger.db"
        with closing(sqlite3.connect(self._ledger)) as connection:
            connection.execute("CREATE TABLE ledger_outside (key TEXT PRIMARY KEY, order_id, what TEXT, calls INT)")
        self.outbox_url = url = f"sqlite:///{self._file}"
        self.settings = Settings.model_validate({"database_url": url})
        self.environment = {"COORDINATOR_DATABASE_URL": url, "LEDGER_URL": f"sqlite:///{self._ledger}"}

    def ask(self, statement: str) -> Rows:
        return self._ask(self._file, statement)

    def ask_outside(self, statement: str) -> Rows:
        return self._ask(self._ledger, statement)

    def queued(self) -> int:
        return int(self.ask("SELECT count(*) FROM embedded_message")[0][0])

    def _ask(self, file: Path, statement: str) -> Rows:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30)) as connection:
            return connection.execute(statement).fetchall()


@dataclass
class World:
    """Runs a script."""

    script: Script
    place: Place
    folder: Path
    check: Callable[["World"], None]
    placed: list[UUID] = field(default_factory=list)
    restarts: int = 0

    def run(self) -> Ran:
        """Run the processes until all sagas have ended, or nothing happens any more; then stop them and check."""
        ran = Ran()
        try:
            self._begin()
            with self._running() as processes:
                self._supervise(processes)
                codes = self._stop(processes)
            assert self.place.queued() == 0, "I8: messages are left in queues"
            assert not self.script.crash_at or (self.folder / "0").exists(), "nobody ever came to the fail point"
            self.check(self)
            assert set(codes) == {0}, f"F14: the processes ended with {codes}"
        except (AssertionError, TimeoutError) as error:
            ran.problem = str(error)
        ran.log = "".join(log.read_text(errors="replace") for log in sorted(self.folder.glob("*.log")))
        ran.restarts = self.restarts
        return ran

    # Before

    def _begin(self) -> None:
        if self.script.prepared:
            asyncio.run(self._prepare())
        else:  # the first process does it, and may die of it
            with self._running() as processes:
                self._until(lambda: "is running" in processes[0].log, processes)
                self._stop(processes)
        self._place_orders()
        if self.script.overdue:
            with self._running("--only", "coordinator") as processes:
                self._until(
                    lambda: self._count("saga_instance", "status = 'compensating'") == len(self.placed), processes
                )
                self._stop(processes)

    async def _prepare(self) -> None:
        """Make the schema and the queues: an event without a receiver would be lost, as everywhere."""
        handlers = [handler.queue for handler in app.handlers]
        coordinator = coordinator_queues(Sagas([saga.definition for saga in app.sagas]))
        async with (
            open_schema(self.place.settings, app.tables) as engine,
            open_bus(self.place.settings, engine) as (bus, _),
        ):
            await bus.declare([*handlers, *coordinator])

    def _place_orders(self) -> None:
        """Leave the orders in the outbox, as a service would."""
        ids, outbox, engine = TimeOrderedIds(), ServiceOutbox("/shop"), create_engine(self.place.outbox_url)
        with Session(engine) as session, session.begin():
            for number in self.script.numbers:
                order = ids.new()
                outbox.add(session, OrderPlaced(order_id=order, number=number), id=str(order))
                self.placed.append(order)
        engine.dispose()

    # Processes

    @contextmanager
    def _running(self, *arguments: str) -> Iterator[list[ForkedProcess]]:
        environment = {
            **self.place.environment,
            "COORDINATOR_LOG_LEVEL": "WARNING",
            "LEDGER_TIMEOUT": str(self.script.timeout),
            "CRASH_AT": self.script.crash_at,
            "CRASH_MARKS": str(self.folder),
            "CRASH_PLANT": self.script.plant,
            "CRASH_POISON": "" if self.script.poison is None else str(self.script.poison),
        }
        processes: list[ForkedProcess] = []
        try:
            for number in range(self.script.processes):
                log = self.folder / f"{number}.log"
                processes.append(ForkedProcess(log, "run", APP, *arguments, environment=environment))
            yield processes
        finally:
            for process in processes:
                process.kill9()

    def _keep_alive(self, processes: Sequence[ForkedProcess]) -> None:
        """Start again who has ended, as systemd does."""
        for process in processes:
            if process.exit_code is not None:
                process.restart()
                self.restarts += 1

    def _stop(self, processes: Sequence[ForkedProcess]) -> list[int]:
        """Ask all to stop; return their exit codes."""
        for process in processes:
            process.ask_to_stop()
        self._wait(lambda: all(process.exit_code is not None for process in processes), "the end of the processes")
        return [process.exit_code or 0 for process in processes]

    def _supervise(self, processes: Sequence[ForkedProcess]) -> None:
        stop_at = self.script.stop_at
        if stop_at:
            self._until(lambda: self._count("saga_history") >= stop_at, processes)
            self._stop(processes)
        self._until(self._is_over, processes)

    # Waiting

    def _until(self, reached: Callable[[], bool], processes: Sequence[ForkedProcess]) -> None:
        """Keep the processes alive until something is reached; raise when nothing happens any more."""
        seen, changed = self._progress(), time.monotonic()

        def look() -> bool:
            nonlocal seen, changed
            self._keep_alive(processes)
            if reached():
                return True
            if (now := self._progress()) != seen:
                seen, changed = now, time.monotonic()
            elif time.monotonic() - changed > QUIET:
                raise TimeoutError(f"I1: nothing happens any more: {self._sagas()}")
            return False

        self._wait(look, "the end of all sagas")

    def _wait(self, over: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not over():
            if time.monotonic() > end:
                raise TimeoutError(f"I1: {what} did not come: {self._sagas()}")
            time.sleep(LOOK_EVERY)

    def _is_over(self) -> bool:
        ended = self._count("saga_instance", "status NOT IN ('running', 'compensating')")
        busy = self._count("retry") + self._count("outbox") + (ended < len(self.placed))
        return not busy and self.place.queued() == 0

    def _progress(self) -> tuple[int, ...]:
        try:
            attempts = self.place.ask("SELECT coalesce(sum(attempts), 0) FROM retry")[0][0]
            return (self._count("saga_history"), self._count("inbox"), self._count("outbox"), int(attempts))
        except (psycopg.errors.UndefinedTable, sqlite3.OperationalError):
            return ()  # there is no schema yet

    def _count(self, table: str, where: str = "true") -> int:
        return int(self.place.ask(f"SELECT count(*) FROM {table} WHERE {where}")[0][0])  # noqa: S608

    def _sagas(self) -> Rows:
        return self.place.ask("SELECT status, count(*) FROM saga_instance GROUP BY status")
