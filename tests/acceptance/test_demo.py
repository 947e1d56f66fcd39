"""`coordinator demo` on the embedded default: undisturbed, and killed again and again."""

import json
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from coordinator.demo.generate import make_events
from coordinator.demo.run import STOCK
from tests.support.base import wait_until
from tests.support.processes import Process, finish, run

pytestmark = pytest.mark.acceptance

EXPECTED_SAGAS = {
    ("place_order", "completed"): 38,
    ("place_order", "compensated"): 10,
    ("sign_up", "completed"): 21,
    ("sign_up", "compensated"): 9,
}
EXPECTED_EFFECTS = {
    "charge": 43,
    "e-mail": 32,
    "notification": 21,
    "refund": 5,
    "shipment": 38,
    "subscription": 24,
    "unsubscription": 3,
}


def demo(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run("demo", "--directory", str(folder), "--json", environment={}, fresh=True))
    return document


def effects(folder: Path) -> list[dict[str, Any]]:
    """What third parties did."""
    lines = (folder / "journal.jsonl").read_bytes().splitlines()
    return [entry for entry in map(json.loads, lines) if "key" in entry]


def keys_of(folder: Path, saga: str, status: str) -> set[str]:
    """The business keys of the sagas that ended so, as an operator lists them."""
    environment = {"COORDINATOR_DATABASE_URL": f"sqlite:///{folder / 'coordinator.db'}"}
    listed = json.loads(
        run("sagas", "list", "--saga", saga, "--status", status, "--limit", "1000", "--json", environment=environment)
    )
    return {each["key"] for each in listed["sagas"]}


def stock(folder: Path) -> dict[str, int]:
    with closing(sqlite3.connect(folder / "coordinator.db")) as connection:
        return dict(connection.execute("SELECT sku, available FROM stock_item").fetchall())


def check(document: dict[str, Any], folder: Path) -> None:
    sagas = {(each["saga"], each["status"]): each["count"] for each in document["sagas"]}
    assert sagas == EXPECTED_SAGAS
    assert document["third_parties"] == EXPECTED_EFFECTS
    done = effects(folder)
    assert max(Counter(effect["key"] for effect in done).values()) == 1, "an effect happened twice for its key"
    assert max(Counter((e["what"], e["of"], e.get("subject")) for e in done).values()) == 1, "it came under two keys"
    charged, refunded, shipped = (
        {effect["of"] for effect in done if effect["what"] == what} for what in ("charge", "refund", "shipment")
    )
    assert refunded == charged & keys_of(folder, "place_order", "compensated")
    assert shipped == keys_of(folder, "place_order", "completed")
    assert charged == refunded | shipped, "money was kept for nothing"
    assert not refunded & shipped, "goods were given away"
    taken: Counter[str] = Counter()
    for order in (event["data"] for event in make_events() if event["type"] == "order.placed"):
        if order["order_id"] in shipped:
            taken[order["sku"]] += order["quantity"]
    assert stock(folder) == {sku: number - taken[sku] for sku, number in STOCK.items()}


def test_every_saga_ends_well(tmp_path: Path) -> None:
    """Failures at every step, and each saga is completed or compensated with all its effects."""
    document = demo(tmp_path)
    check(document, tmp_path)
    assert document["repeats"] == 8, "two charges whose answer was lost are asked for five times each"


def test_starting_it_again_changes_nothing(tmp_path: Path) -> None:
    """The same events again are duplicates: no second saga, no second e-mail."""
    first = demo(tmp_path)
    journal = (tmp_path / "journal.jsonl").read_bytes()
    again = demo(tmp_path)
    check(again, tmp_path)
    assert again == first
    assert (tmp_path / "journal.jsonl").read_bytes() == journal


def test_people_get_tables_without_control_characters_where_there_is_no_terminal(tmp_path: Path) -> None:
    printed = run("demo", "--directory", str(tmp_path), environment={"COLUMNS": "80"})
    assert not any(ord(character) < 32 and character != "\n" for character in printed)
    tables, _, hints = printed.partition("Look closer")
    assert max(map(len, tables.splitlines())) <= 80
    assert "place_order" in tables
    assert f"sqlite:///{tmp_path / 'coordinator.db'}" in hints, "a line to be copied is not wrapped"


@pytest.mark.parametrize(
    "kills", [(1,), (5, 25, 60), (15, 40, 80, 120)], ids=["at the start", "three times", "four times"]
)
def test_kill_9_in_the_middle_loses_nothing_and_repeats_nothing(tmp_path: Path, kills: tuple[int, ...]) -> None:
    """Killed after so many lines of the journal, and started again on the same folder."""
    journal = tmp_path / "journal.jsonl"
    process = Process(tmp_path / "log", "demo", "--directory", str(tmp_path), "--json", environment={}, fresh=True)
    with process:
        for number, lines in enumerate(kills):
            if number:
                process.start()

            def far_enough(lines: int = lines) -> bool:
                return journal.exists() and journal.read_bytes().count(b"\n") >= lines

            wait_until(far_enough, f"{lines} lines")
            process.kill9()
    assert not process.log, "it ended before it was killed, or complained"
    check(demo(tmp_path), tmp_path)


def test_what_cannot_be_read_or_was_said_twice_is_not_waited_for(tmp_path: Path) -> None:
    """A file of one's own: the line that is no event is named, the exit code says so, and the rest is done."""
    events = list(make_events())[:4]
    twice = {**events[0], "id": "another-event-of-the-same-user"}
    file = tmp_path / "events.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in [*events, twice]) + "not an event\n")
    done = finish("demo", "--directory", str(tmp_path), "--events", str(file), "--json", environment={}, seconds=90)
    assert done.returncode == 1
    assert done.stderr.startswith("line 6: ")
    assert {(each["saga"], each["count"]) for each in json.loads(done.stdout)["sagas"]} == {
        ("place_order", 2),
        ("sign_up", 2),
    }


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['aiosmtpd'] = None; from coordinator.cli import main; sys.argv[1:] = ['demo']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'saga-coordinator[demo]'" in done.stderr
    assert "Traceback" not in done.stderr
