"""Every fail point, with a kill, an exception and a cancel, on both stores: all ends well, all happens once.

The deadlines of the steps are an hour, so that no command that is sent again hides what was lost. By default a part
of the cases runs; CRASH_MATRIX=full (`make test-crash`) runs all.
"""

import itertools
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from events import ServiceOutbox
from events.ids import TimeOrderedIds
from tests.support.base import Postgres, RabbitMQ
from tests.support.counts import note
from tests.support.invariants import check_ledger
from tests.support.ledger_app import OrderPlaced
from tests.support.processes import Process

pytestmark = pytest.mark.acceptance

APP = "tests.support.crash_app:app"
ORDERS = 12
SIDE_BY_SIDE = 6  # most of a case is waiting for leases to end
PATIENCE = 100.0
FULL = os.environ.get("CRASH_MATRIX") == "full"

PLACES = {
    "handler.received": "F1",
    "handler.after_run": "F2",
    "handler.before_commit": "F2",
    "handler.after_commit": "F4",
    "handler.after_ack": "F5",
    "relay.claimed": "F6",
    "relay.before_publish": "F7",
    "relay.after_confirm": "F8",
    "engine.received": "F10",
    "engine.before_commit": "F10",
    "engine.after_commit": "F11",
    "retries.claimed": "F12",
}
STORES = ("servers", "embedded")


@dataclass(frozen=True)
class Case:
    """A place, what happens there, and on which store; `plant` is a bug to be found."""

    place: str
    what: str
    store: str
    hit: int = 2
    plant: str = ""

    @property
    def id(self) -> str:
        return f"{PLACES[self.place]}-{self.place}-{self.what}-{self.store}"

    @property
    def crash_at(self) -> str:
        """The waiting messages are claimed only after something has been delivered twice."""
        if self.place == "retries.claimed":
            return f"handler.before_commit:kill:2,{self.place}:{self.what}:1"
        hit = 1 if self.place == "relay.claimed" else self.hit
        return f"{self.place}:{self.what}:{hit}"

    @property
    def happens(self) -> bool:
        """On the embedded bus the outbox is the bus: after the first messages its relay has nothing to do."""
        return self.store == "servers" or not self.place.startswith("relay.") or self.place == "relay.claimed"


ALL = [
    case
    for place, what, store in itertools.product(PLACES, ("kill", "raise", "cancel"), STORES)
    if (case := Case(place, what, store)).happens
]
SHORT = [
    case
    for number, place in enumerate(PLACES)
    for what, store in (("kill", STORES[number % 2]), (("raise", "cancel")[number % 2], STORES[(number + 1) % 2]))
    if (case := Case(place, what, store)).happens
]
CASES = ALL if FULL else SHORT
PLANTED = [
    Case("handler.before_commit", "kill_late", "servers", plant="ack_first"),
    Case("relay.before_publish", "kill", "servers", plant="delete_first"),
]


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
            log = self.folder / "log"
            with Process(log, "run", APP, environment=environment) as first:  # makes the tables and the queues
                self._wait(lambda: "is running" in first.log, "the first start")
                first.terminate()
            ran.placed = self._place()
            armed = {"CRASH_AT": self.case.crash_at, "CRASH_MARKS": str(self.folder), "CRASH_PLANT": self.case.plant}
            process = stack.enter_context(Process(log, "run", APP, environment={**environment, **armed}))
            try:
                self._wait(lambda: self._is_over(process), "the end of all sagas")
                assert (self.folder / "0").exists(), "the process never came to the fail point"
                check_ledger(self.ask, self.ask_outside, ran.placed)
            except (AssertionError, TimeoutError) as error:
                ran.problem = str(error)
            ran.log = log.read_text(errors="replace")
        return ran

    def ask(self, statement: str) -> list[tuple[Any, ...]]:
        if self.case.store == "embedded":
            return _ask_sqlite(self.folder / "coordinator.db", statement)
        with psycopg.connect(self._dsn) as connection:
            return connection.execute(statement.encode()).fetchall()

    def ask_outside(self, statement: str) -> list[tuple[Any, ...]]:
        if self.case.store == "embedded":
            return _ask_sqlite(self.folder / "ledger.db", statement)
        return self.ask(statement)

    def _servers(self, stack: ExitStack) -> dict[str, str]:
        common = {"LEDGER_TIMEOUT": "3600", "COORDINATOR_LOG_LEVEL": "WARNING"}
        if self.case.store == "embedded":
            self.url = f"sqlite:///{self.folder / 'coordinator.db'}"
            ledger = self.folder / "ledger.db"
            with closing(sqlite3.connect(ledger)) as connection:
                connection.execute("CREATE TABLE ledger_outside (key TEXT PRIMARY KEY, order_id, what TEXT, calls INT)")
            return {**common, "COORDINATOR_DATABASE_URL": self.url, "LEDGER_URL": f"sqlite:///{ledger}"}
        url = stack.enter_context(self._postgres.database())
        self._dsn = url.replace("postgresql+asyncpg", "postgresql")
        self.url = self._dsn.replace("postgresql://", "postgresql+psycopg://")
        broker = stack.enter_context(self._rabbitmq.vhost())
        return {
            **common,
            "COORDINATOR_BROKER_URL": broker,
            "COORDINATOR_DATABASE_URL": url,
            "LEDGER_URL": url,
        }

    def _place(self) -> list[UUID]:
        """Leave the orders in the outbox, as a service would."""
        ids, outbox, engine = TimeOrderedIds(), ServiceOutbox("/shop"), create_engine(self.url)
        placed = []
        with Session(engine) as session, session.begin():
            for number in range(ORDERS):
                placed.append(ids.new())
                outbox.add(session, OrderPlaced(order_id=placed[-1], number=number), id=str(placed[-1]))
        engine.dispose()
        return placed

    def _is_over(self, process: Process) -> bool:
        if process.has_ended:
            process.start()  # as systemd does
        counts = self.ask("SELECT count(*) FROM saga_instance WHERE status NOT IN ('running', 'compensating')")
        waits = self.ask("SELECT count(*) FROM retry") + self.ask("SELECT count(*) FROM outbox")
        return counts == [(ORDERS,)] and waits == [(0,), (0,)]

    def _wait(self, over: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + (PATIENCE / 2 if self.case.plant else PATIENCE)
        while not over():
            if time.monotonic() > end:
                sagas = self.ask("SELECT status, count(*) FROM saga_instance GROUP BY status")
                raise TimeoutError(f"I1: {what} did not come: {sagas}")
            time.sleep(0.25)


def _ask_sqlite(file: Path, statement: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30)) as connection:
        return connection.execute(statement).fetchall()


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, rabbitmq: RabbitMQ, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Case], Ran]]:
    """Runs all cases side by side, from the first one that is asked for; a part of them one by one."""
    whole = len([item for item in request.session.items if item.path == request.path]) == len(CASES) + len(PLANTED)
    started: dict[Case, Future[Ran]] = {}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:

        def run(case: Case) -> Ran:
            for each in [*PLANTED, *CASES] if whole and not started else [case]:
                if each not in started:
                    folder = tmp_path_factory.mktemp("case")
                    started[each] = pool.submit(World(each, rabbitmq, postgres, folder).run)
            return started[case].result()

        yield run
    note(request.config, f"crash matrix: {len(started)} cases of {len(ALL) + len(PLANTED)}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_all_sagas_end_well_and_all_effects_happen_once(case: Case, runs: Callable[[Case], Ran]) -> None:
    ran = runs(case)
    assert ran.problem is None, f"{ran.problem}\n{ran.log[-4000:]}"


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: case.plant)
def test_a_planted_bug_is_found(case: Case, runs: Callable[[Case], Ran]) -> None:
    """The checks are not toothless: without one defence, and with no other that hides it, something is lost."""
    assert runs(case).problem is not None
