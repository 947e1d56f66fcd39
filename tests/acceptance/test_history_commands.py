"""Histories are checked and archived with the command line."""

import gzip
import json
import sqlite3
from pathlib import Path

import pytest

from tests.acceptance.test_cli import coordinator, event
from tests.support.base import wait_until
from tests.support.processes import Process

pytestmark = pytest.mark.acceptance

APP = "tests.support.ledger_app:app"
ORDERS = [f"01a20000-0000-7000-8000-00000000000{number}" for number in range(1, 4)]


def test_a_database_is_checked_and_archived(tmp_path: Path) -> None:
    """It is checked while it is worked on; what was tampered with is found; what is old is written out."""
    file, archive = tmp_path / "coordinator.db", tmp_path / "old.jsonl.gz"
    environment = {"COORDINATOR_DATABASE_URL": f"sqlite:///{file}", "LEDGER_URL": f"sqlite:///{tmp_path / 'ledger.db'}"}
    with sqlite3.connect(tmp_path / "ledger.db") as ledger:  # the third party's
        ledger.execute("CREATE TABLE ledger_outside (key TEXT PRIMARY KEY, order_id TEXT, what TEXT, calls INTEGER)")
    ledger.close()

    def listed(*options: str) -> list[str]:
        found = coordinator(environment, "sagas", "list", *options, "--json")
        return [each["key"] for each in json.loads(found.stdout)["sagas"]] if found.stdout else []

    with Process(tmp_path / "log", "run", APP, environment=environment) as process:
        wait_until(lambda: "is running" in process.log, "the application")
        assert process.terminate() == 0, process.log
    lines = "\n".join(event(order, number) for number, order in enumerate(ORDERS, 1))
    assert coordinator(environment, "publish", "-", "--app", APP, given=lines + "\n").returncode == 0
    with Process(tmp_path / "log", "run", APP, environment=environment) as process:
        wait_until(lambda: len(listed("--status", "completed")) == 3, "the sagas")
        checked = coordinator(environment, "verify")
        assert (checked.returncode, checked.stderr) == (0, "")
        assert checked.stdout.startswith("3 sagas with 12 transitions, ")
        assert checked.stdout.endswith("all holds\n")
        assert process.terminate() == 0, process.log

    with sqlite3.connect(file) as connection:
        [[victim]] = connection.execute("SELECT id FROM saga_instance WHERE key = ?", [ORDERS[1]]).fetchall()
        forged = "UPDATE saga_history SET result = 'declined' WHERE saga_id = ? AND revision = 2"
        connection.execute(forged, [victim])
    connection.close()
    found = coordinator(environment, "verify", "--json")
    assert found.returncode == 1
    first, *_, counts = [json.loads(line) for line in found.stdout.splitlines()]
    assert first["saga_id"].replace("-", "") == victim
    assert counts["findings"]["I13"] >= 1
    assert "I13" in coordinator(environment, "verify").stdout
    assert coordinator(environment, "verify", "--since", "2100-01-01").returncode == 0

    age = ("sagas", "archive", "--finished-before", "0s")
    vague = coordinator(environment, *age)
    assert (vague.returncode, vague.stderr.startswith("error: say where they are written")) == (1, True)
    assert "an age is a number and d, h, m or s" in coordinator(environment, *age[:-1], "soon").stderr
    assert coordinator(environment, *age, "--dry-run").stdout.startswith("3 sagas would be archived")
    done = coordinator(environment, *age, "--to", str(archive), "--json")
    assert json.loads(done.stdout) == {"sagas": 3, "held": 0, "keys": 0}, done.stderr
    written = [json.loads(line) for line in gzip.decompress(archive.read_bytes()).splitlines()]
    assert sorted(each["key"] for each in written) == ORDERS
    assert all(len(each["history"]) == 4 for each in written)
    assert sorted(listed("--status", "archived")) == ORDERS
    assert coordinator(environment, "verify").returncode == 0
