"""A process that fails where it is told to, with a broker and a database of its own, and a tap on the wire.

One that is told to stop stands still there, for longer than all leases, and then goes on as if nothing had happened.
Where several processes may work on one database a second one takes its work over meanwhile; and when that has ended,
the first one must be able to do further work alone.
"""

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
FURTHER_ORDERS = 6
PATIENCE = 120.0  # seconds without any progress; a process was seen to take 60 to start on a machine that is busy

STORES = ("servers", "embedded", "mixed")
"""RabbitMQ with PostgreSQL, the embedded bus with SQLite, RabbitMQ with SQLite."""

_one_migration = threading.Lock()  # Alembic has one context for all threads

STANDS_STILL = 40.0  # seconds: RabbitMQ drops a connection after 20 to 30, the other leases are shorter
SHORT_LEASE = 2.0  # where that is too long; a quarter of the time for which a process then stands still


def expected(batches: list[int]) -> dict[str, int]:
    """Return how many events of each type there are in the end, beside the replies."""
    orders, refused = sum(batches), sum(len(range(0, batch, 5)) for batch in batches)
    return {
        "order.placed": orders,
        **dict.fromkeys(("reserve", "charge", "ship"), orders),
        **dict.fromkeys(("refund", "release"), refused),
        "order.done": orders - refused,
        "order.undone": refused,
    }


@dataclass(frozen=True)
class Case:
    """What happens at which fail point, and on which store.

    Attributes:
        before: what has to happen first, for the process to come to that place.
        hit: at which time of coming there it happens.
        environment: further settings of the process.
        plant: a defence that is taken away, so that something is to be found.
        short_leases: do not wait for leases as long as those of production.
        holds_others: a process that stands still here holds what all others need.
    """

    place: str
    what: str
    store: str
    before: str = ""
    hit: int = 2
    environment: tuple[tuple[str, str], ...] = ()
    plant: str = ""
    short_leases: bool = False
    holds_others: bool = False

    @property
    def has_second(self) -> bool:
        """Whether another process takes over what the first one stands still with."""
        return self.what == "stop" and self.store == "servers"

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
        self._placed: list[UUID] = []
        self._batches: list[int] = []
        self._stopped_at = 0.0
        self._work_then: object = None

    def run(self) -> Ran:
        ran = Ran(placed=self._placed)
        with ExitStack() as stack:
            environment = self._servers(stack)
            self._place(ORDERS)
            environment |= {
                "CRASH_AT": ",".join(self.case.crash_at),
                "CRASH_MARKS": str(self.folder),
                "CRASH_PLANT": self.case.plant,
                "CRASH_LEASE": str(SHORT_LEASE) if self.case.short_leases else "",
                **dict(self.case.environment),
            }
            process = Process(self.folder / "log", "run", APP, environment=environment)
            self._second = Process(self.folder / "second.log", "run", APP, environment=environment)
            stack.push(self._second)
            stack.enter_context(process)
            try:
                self._wait(process)
                self._check_crashes()
                if self.case.what == "stop":
                    self._go_on(process)
                self._check()
            except (AssertionError, TimeoutError) as error:
                ran.problem = str(error)
            ran.log = "\n".join(log.read_text(errors="replace") for log in self.folder.glob("*log"))
        return ran

    def _place(self, count: int) -> None:
        self._placed += place_orders(self._database, count)
        self._batches.append(count)

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
            url_of_tap = stack.enter_context(self.tap.on(broker))
            heartbeat = f"?heartbeat={SHORT_LEASE:.0f}" if self.case.short_leases else ""
            environment["COORDINATOR_BROKER_URL"] = url_of_tap + heartbeat
        with _one_migration:
            asyncio.run(_make_tables(url))
        return environment

    def _is_over(self, process: Process) -> bool:
        if process.has_ended:
            process.start()  # as systemd does
        if self.tap and self.tap.found:
            return True
        if self.case.what == "stop" and self._stands_still(process):
            return False
        counts = self.ask("SELECT count(*) FROM saga_instance WHERE status NOT IN ('running', 'compensating')")
        waits = self.ask("SELECT count(*) FROM retry") + self.ask("SELECT count(*) FROM outbox")
        return counts == [(len(self._placed),)] and waits == [(0,), (0,)]

    def _stands_still(self, process: Process) -> bool:
        """Say whether the process stands still; let it go on when it has done so for long enough."""
        if not process.is_stopped:
            return False
        if not self._stopped_at:
            self._stopped_at, self._work_then = time.monotonic(), self._work()
            if self.case.has_second:
                self._second.start()
        is_over = time.monotonic() > self._stopped_at + (4 * SHORT_LEASE if self.case.short_leases else STANDS_STILL)
        takes_over = self.case.has_second and not self.case.holds_others
        if not is_over or (takes_over and self._work() == self._work_then):
            return True
        process.resume()
        return False

    def _go_on(self, process: Process) -> None:
        """Let the process that stood still do further work, alone, and come to an end of its own."""
        if self.case.has_second:
            assert self._second.terminate() == 0, "the second process does not end well"
            self._place(FURTHER_ORDERS)
            self._wait(process)
        assert process.terminate() == 0, "the process does not end well"

    def _check_crashes(self) -> None:
        if self.tap:
            assert not self.tap.found, "\n".join(self.tap.found)
        for number, each in enumerate(self.case.crash_at):
            assert (self.folder / str(number)).exists(), f"the process never came to {each}"

    def _check(self) -> None:
        self._check_crashes()
        check_ledger(self.ask, self.ask_outside, self._placed)
        if self.case.store == "servers":
            check_atomic(self.ask)
        if self.tap:
            types, wanted = self.tap.types, expected(self._batches)
            assert {each: types[each] for each in wanted} == wanted, f"I7, I8: {types}"
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
        return self._work(), process.log.count("is running"), len(list(self.folder.glob("[0-9]")))

    def _work(self) -> object:
        """What has been done, by whomever."""
        return [self.ask(f"SELECT count(*) FROM {table}") for table in ("saga_history", "inbox")]


async def _make_tables(url: str) -> None:
    engine = open_database(url)
    await schema.upgrade(engine, [tables])
    await engine.dispose()


def _ask_sqlite(file: Path, statement: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30)) as connection:
        return connection.execute(statement).fetchall()
