"""A process that fails where it is told to, with a broker and a database of its own, and a tap on the wire."""

import asyncio
import sqlite3
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy import create_engine

from coordinator import schema
from events.database import open_database
from tests.support.base import Postgres, RabbitMQ
from tests.support.invariants import check_atomic, check_ledger
from tests.support.ledger_app import place_orders, tables
from tests.support.processes import Process
from tests.support.tap import Tap

APP = "tests.support.crash_app:app"
ORDERS = 12
REFUSED = len(range(0, ORDERS, 5))
PATIENCE = 60.0  # seconds without any progress; processes start slowly on a machine that is busy

STORES = ("servers", "embedded", "mixed")
"""RabbitMQ with PostgreSQL, the embedded bus with SQLite, RabbitMQ with SQLite."""

_one_migration = threading.Lock()  # Alembic has one context for all threads

EXPECTED = {
    "order.placed": ORDERS,
    **dict.fromkeys(("reserve", "charge", "ship"), ORDERS),
    **dict.fromkeys(("refund", "release"), REFUSED),
    "order.done": ORDERS - REFUSED,
    "order.undone": REFUSED,
}
"""How many events of each type there are in the end, beside the replies."""


@dataclass(frozen=True)
class Case:
    """What happens at which fail point, and on which store.

    Attributes:
        before: what has to happen first, for the process to come to that place.
        hit: at which time of coming there it happens.
        environment: further settings of the process.
        plant: a defence that is taken away, so that something is to be found.
    """

    place: str
    what: str
    store: str
    before: str = ""
    hit: int = 2
    environment: tuple[tuple[str, str], ...] = ()
    plant: str = ""

    @property
    def crash_at(self) -> list[str]:
        return [*filter(None, [self.before]), f"{self.place}:{self.what}:{self.hit}"]


@dataclass
class Ran:
    """How a case went."""

    problem: str | None = None
    log: str = ""
    placed: list[UUID] = field(default_factory=list)


class World:
    """One case: servers or files of its own, a process that is started again whenever it ends, and orders."""

    def __init__(self, case: Case, rabbitmq: RabbitMQ, postgres: Postgres, folder: Path) -> None:
        self.case = case
        self.folder = folder
        self._rabbitmq = rabbitmq
        self._postgres = postgres

    def run(self) -> Ran:
        ran = Ran()
        with ExitStack() as stack:
            environment = self._servers(stack)
            ran.placed = place_orders(self._database, ORDERS)
            environment |= {
                "CRASH_AT": ",".join(self.case.crash_at),
                "CRASH_MARKS": str(self.folder),
                "CRASH_PLANT": self.case.plant,
                **dict(self.case.environment),
            }
            log = self.folder / "log"
            process = stack.enter_context(Process(log, "run", APP, environment=environment))
            try:
                self._wait(process)
                self._check(ran.placed)
            except (AssertionError, TimeoutError) as error:
                ran.problem = str(error)
            ran.log = log.read_text(errors="replace")
        return ran

    def ask(self, statement: str) -> list[tuple[Any, ...]]:
        if self.case.store == "servers":
            return self._connection.execute(statement.encode()).fetchall()
        return _ask_sqlite(self.folder / "coordinator.db", statement)

    def ask_outside(self, statement: str) -> list[tuple[Any, ...]]:
        if self.case.store == "servers":
            return self.ask(statement)
        return _ask_sqlite(self.folder / "ledger.db", statement)

    def _servers(self, stack: ExitStack) -> dict[str, str]:
        environment = {"LEDGER_TIMEOUT": "3600", "COORDINATOR_LOG_LEVEL": "WARNING"}
        if self.case.store == "servers":
            url = stack.enter_context(self._postgres.database())
            dsn = url.replace("postgresql+asyncpg", "postgresql")
            self._connection = stack.enter_context(psycopg.connect(dsn, autocommit=True))
            self._database = create_engine(dsn.replace("postgresql://", "postgresql+psycopg://"))
            environment |= {"COORDINATOR_DATABASE_URL": url, "LEDGER_URL": url}
        else:
            url = f"sqlite:///{self.folder / 'coordinator.db'}"
            self._database = create_engine(url)
            ledger = self.folder / "ledger.db"
            with closing(sqlite3.connect(ledger)) as connection:
                connection.execute("CREATE TABLE ledger_outside (key TEXT PRIMARY KEY, order_id, what TEXT, calls INT)")
            environment |= {"COORDINATOR_DATABASE_URL": url, "LEDGER_URL": f"sqlite:///{ledger}"}
        stack.callback(self._database.dispose)
        self.tap: Tap | None = None
        if self.case.store != "embedded":
            self.tap = Tap(self._database)
            broker = stack.enter_context(self._rabbitmq.vhost())
            environment["COORDINATOR_BROKER_URL"] = stack.enter_context(self.tap.on(broker))
        with _one_migration:
            asyncio.run(_make_tables(url))
        return environment

    def _is_over(self, process: Process) -> bool:
        if process.has_ended:
            process.start()  # as systemd does
        if self.tap and self.tap.found:
            return True
        counts = self.ask("SELECT count(*) FROM saga_instance WHERE status NOT IN ('running', 'compensating')")
        waits = self.ask("SELECT count(*) FROM retry") + self.ask("SELECT count(*) FROM outbox")
        return counts == [(ORDERS,)] and waits == [(0,), (0,)]

    def _check(self, placed: list[UUID]) -> None:
        if self.tap:
            assert not self.tap.found, "\n".join(self.tap.found)
        for number, each in enumerate(self.case.crash_at):
            assert (self.folder / str(number)).exists(), f"the process never came to {each}"
        check_ledger(self.ask, self.ask_outside, placed)
        if self.case.store == "servers":
            check_atomic(self.ask)
        if self.tap:
            types = self.tap.types
            assert {each: types[each] for each in EXPECTED} == EXPECTED, f"I7, I8: {types}"
            assert self.tap.acknowledged, "I6: nothing was acknowledged"

    def _wait(self, process: Process) -> None:
        """Return when all sagas have ended.

        Raises:
            TimeoutError: nothing has moved for a long time.
        """
        moved, end = self._progress(process), time.monotonic() + PATIENCE
        while not self._is_over(process):
            if (now := self._progress(process)) != moved:
                moved, end = now, time.monotonic() + PATIENCE
            elif time.monotonic() > end:
                raise TimeoutError(f"I1: the end of all sagas did not come: {now}")
            time.sleep(0.25)

    def _progress(self, process: Process) -> object:
        """What only grows, and does as long as something comes of what is done."""
        rows = [self.ask(f"SELECT count(*) FROM {table}") for table in ("saga_history", "inbox")]
        return rows, process.log.count("is running"), len(list(self.folder.glob("[0-9]")))


async def _make_tables(url: str) -> None:
    engine = open_database(url)
    await schema.upgrade(engine, [tables])
    await engine.dispose()


def _ask_sqlite(file: Path, statement: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30)) as connection:
        return connection.execute(statement).fetchall()
