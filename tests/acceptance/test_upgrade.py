"""The upgrade drill: a new version beside instances in flight, some taken over, and all the way back.

UPGRADE_SAGAS=1000 for many instances (`make test-crash`); 40 otherwise.
"""

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from events.ids import TimeOrderedIds
from tests.acceptance.test_cli import coordinator, event
from tests.support.base import wait_until
from tests.support.processes import Process

pytestmark = pytest.mark.acceptance

APP = "tests.support.upgrade_app"
SAGAS = int(os.environ.get("UPGRADE_SAGAS", "40"))
MORE = SAGAS // 4
PATIENCE = 60 + SAGAS / 10
UNFINISHED = "status NOT IN ('completed', 'compensated')"


class Drill:
    """One deployment: on servers several processes side by side, on an SQLite file one after the other."""

    def __init__(
        self, folder: Path, environment: dict[str, str], ask: Callable[[str], list[Any]], stack: ExitStack
    ) -> None:
        self.environment = {**environment, "LEDGER_TIMEOUT": "3600", "COORDINATOR_LOG_LEVEL": "WARNING"}
        self.ask = ask
        self.embedded = "COORDINATOR_BROKER_URL" not in environment
        self.placed: list[tuple[str, int]] = []
        self._folder = folder
        self._stack = stack
        self._running: list[Process] = []

    def deploy(self, app: str, *options: str) -> None:
        """Start a process of this application beside those that run; on an SQLite file in the place of it."""
        if self.embedded:
            self.stop()
        log = self._folder / f"log{len(list(self._folder.glob('log*')))}"
        process = self._stack.enter_context(Process(log, "run", f"{APP}:{app}", *options, environment=self.environment))
        wait_until(lambda: "is running" in process.log, f"the application {app}")
        self._running.append(process)

    def stop(self) -> None:
        """Stop the process that has run for longest."""
        for process in self._running[:1]:
            assert process.terminate() == 0, process.log
            self._running.remove(process)

    def place(self, number: int) -> None:
        """Publish orders; what runs goes on afterwards."""
        ids = TimeOrderedIds()
        orders = [(str(ids.new()), len(self.placed) + each) for each in range(number)]
        self.placed += orders
        lines = "".join(event(*order) + "\n" for order in orders)
        done = coordinator(self.environment, "publish", "-", given=lines)
        assert done.returncode == 0, done.stderr

    def run(self, *arguments: str, code: int = 0, given: str = "") -> Any:
        done = coordinator(self.environment, *arguments, given=given)
        assert done.returncode == code, done.stderr + done.stdout
        return done.stdout

    def in_flight(self) -> dict[int, int]:
        """How many instances of each version have not ended."""
        rows = self.ask(f"SELECT version, count(*) FROM saga_instance WHERE {UNFINISHED} GROUP BY version")
        return dict(sorted(rows))

    def wait_for(self, what: str, count: Callable[[], int], number: int) -> None:
        wait_until(lambda: count() == number, what, PATIENCE)

    def charging(self) -> int:
        """How many wait for the answer to their second step."""
        steps = [row[0] for row in self.ask("SELECT steps FROM saga_instance")]
        read = (each if isinstance(each, dict) else json.loads(each) for each in steps)
        return sum(each.get("charge_card", {}).get("status") == "running" for each in read)

    def count(self, table: str) -> int:
        return int(self.ask(f"SELECT count(*) FROM {table}")[0][0])


@pytest.fixture(params=["embedded", pytest.param("servers", marks=[pytest.mark.rabbitmq, pytest.mark.postgres])])
def drill(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Drill]:
    with ExitStack() as stack:
        if request.param == "servers":
            pg_url, amqp_url = request.getfixturevalue("pg_url"), request.getfixturevalue("amqp_url")
            dsn = pg_url.replace("postgresql+asyncpg", "postgresql")
            connection = stack.enter_context(psycopg.connect(dsn, autocommit=True))
            environment = {"COORDINATOR_BROKER_URL": amqp_url, "COORDINATOR_DATABASE_URL": pg_url, "LEDGER_URL": pg_url}
            yield Drill(tmp_path, environment, lambda query: connection.execute(query.encode()).fetchall(), stack)
            return
        file = tmp_path / "coordinator.db"

        def ask(query: str) -> list[Any]:
            with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=30)) as connection:
                return connection.execute(query).fetchall()

        ledger = tmp_path / "ledger.db"
        with closing(sqlite3.connect(ledger)) as made:
            made.execute("CREATE TABLE ledger_outside (key TEXT PRIMARY KEY, order_id, what TEXT, calls INT)")
        environment = {"COORDINATOR_DATABASE_URL": f"sqlite:///{file}", "LEDGER_URL": f"sqlite:///{ledger}"}
        yield Drill(tmp_path, environment, ask, stack)


def outside(drill: Drill) -> list[Any]:
    query = "SELECT order_id, what FROM ledger_outside"
    if not drill.embedded:
        return drill.ask(query)
    with closing(sqlite3.connect(drill.environment["LEDGER_URL"].removeprefix("sqlite:///"))) as connection:
        return connection.execute(query).fetchall()


def test_an_upgrade_and_the_way_back_with_instances_in_flight(drill: Drill) -> None:
    use_the_first(drill)
    check_that_they_would_bear_the_second(drill)
    before = deploy_the_second(drill)
    in_second = take_some_over(drill, before)
    roll_back(drill, in_second)
    taken_back = in_second // 2
    take_back(drill, taken_back)
    check_ends(drill, in_second - taken_back)
    ended = drill.run("sagas", "export", "--status", "completed", "--status", "compensated")
    verdict = json.loads(drill.run("sagas", "check", f"{APP}:back", "-", "--json", given=ended))
    assert verdict == {"same": SAGAS + MORE, "broken": [], "differing": [], "unclear": {}}


def use_the_first(drill: Drill) -> None:
    """Version 1 is in use: its instances wait for a handler that is away."""
    drill.deploy("first")
    drill.stop()
    if not drill.embedded:
        drill.deploy("first", "--handler", "reserve")
    drill.place(SAGAS)
    if drill.embedded:
        drill.deploy("first", "--handler", "reserve")
    drill.wait_for("version 1 in flight", drill.charging, SAGAS)
    assert drill.in_flight() == {1: SAGAS}


def check_that_they_would_bear_the_second(drill: Drill) -> None:
    """Asked before it is deployed, of an export, as CI does."""
    exported = drill.run("sagas", "export")
    verdict = json.loads(drill.run("sagas", "check", f"{APP}:second", "-", "--json", given=exported))
    assert verdict == {"same": SAGAS, "broken": [], "differing": [], "unclear": {}}


def deploy_the_second(drill: Drill) -> dict[int, int]:
    """Version 2 is deployed beside version 1, and then in its place; return what is in flight of both."""
    if drill.embedded:
        drill.stop()
        drill.place(MORE)
        drill.deploy("second", "--handler", "reserve")
    else:
        drill.deploy("second", "--handler", "reserve")
        drill.place(MORE // 2)
        drill.wait_for("starts while both run", drill.charging, SAGAS + MORE // 2)
        drill.stop()
        drill.place(MORE - MORE // 2)
    drill.wait_for("version 2 in flight", drill.charging, SAGAS + MORE)
    before = drill.in_flight()
    assert sum(before.values()) == SAGAS + MORE
    assert before[1] >= SAGAS
    assert before[2] >= MORE - MORE // 2
    shown = json.loads(drill.run("sagas", "versions", "--app", f"{APP}:second", "--json"))
    assert [(each["version"], each["in_flight"], each["code"]) for each in shown] == [
        (1, before[1], "finishes"),
        (2, before[2], "starts new ones"),
    ]
    return before


def take_some_over(drill: Drill, before: dict[int, int]) -> int:
    """Rehearse a migration of all, and migrate some; return how many are in flight in version 2 then."""
    migrate = ("sagas", "migrate", f"{APP}:second", "order", "--to", "2", "--json")
    rehearsed = json.loads(drill.run(*migrate, "--dry-run", code=1))
    [stay] = rehearsed["stay"]
    assert stay["reason"] == "packed_too raised ValueError('this customer wants no box')"
    assert rehearsed["migrated"] + len(stay["sagas"]) == before[1]
    assert drill.in_flight() == before
    if drill.embedded:
        drill.stop()
    moved = json.loads(drill.run(*migrate, "--limit", str(SAGAS // 2), "--why", "a drill", "--by", "ada", code=1))
    taken_over = int(moved["migrated"])
    assert taken_over >= SAGAS // 3
    assert drill.in_flight() == {1: before[1] - taken_over, 2: before[2] + taken_over}
    drill.stop()
    return before[2] + taken_over


def roll_back(drill: Drill, in_second: int) -> None:
    """Back to the code of version 1, which has never heard of version 2: it ends its own, and leaves others alone."""
    drill.deploy("first")
    drill.wait_for("the end of version 1", lambda: drill.in_flight().get(1, 0), 0)
    drill.wait_for("replies to version 2, held", lambda: drill.count("retry"), in_second)
    assert drill.in_flight() == {2: in_second}
    drill.stop()


def take_back(drill: Drill, number: int) -> None:
    """Some are taken back to version 1, the others end in version 2, both in one process."""
    migrate = ("sagas", "migrate", f"{APP}:back", "order", "--to", "1", "--json", "--limit", str(number))
    taken_back = json.loads(drill.run(*migrate, "--why", "a drill", "--by", "ada"))
    assert taken_back == {"dry_run": False, "migrated": number, "stay": []}
    drill.deploy("back")
    drill.wait_for("the end of all", lambda: sum(drill.in_flight().values()), 0)


def check_ends(drill: Drill, packed: int) -> None:
    """All have ended as their numbers say, and each effect has happened once."""
    found = {
        UUID(key): (status, version)
        for key, status, version in drill.ask("SELECT key, status, version FROM saga_instance")
    }
    assert set(found) == {UUID(order) for order, _ in drill.placed}
    effects: dict[UUID, Counter[str]] = {order: Counter() for order in found}
    for order, what in drill.ask("SELECT order_id, what FROM ledger_inside") + outside(drill):
        effects[UUID(str(order))][what] += 1
    for order, number in ((UUID(order), number) for order, number in drill.placed):
        status, version = found[order]
        refused = number % 5 == 0
        assert status == ("compensated" if refused else "completed"), f"{order} is {status}"
        expected = Counter(["reserve", "charge"] + (["refund", "release"] if refused else ["ship"]))
        expected += Counter(["pack"] if version == 2 else [])
        assert effects[order] == expected, f"{order} in version {version}: {effects[order]}"
    assert sum(version == 2 for _, version in found.values()) == packed
    assert drill.count("dead_letter") == drill.count("retry") == 0
