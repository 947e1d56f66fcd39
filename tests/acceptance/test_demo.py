"""`coordinator demo` on the embedded default: undisturbed, and killed again and again."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.base import wait_until
from tests.support.processes import Process, run

pytestmark = pytest.mark.acceptance

EXPECTED_SAGAS = {
    ("place_order", "completed"): 38,
    ("place_order", "compensated"): 10,
    ("sign_up", "completed"): 23,
    ("sign_up", "compensated"): 7,
}
EXPECTED_EFFECTS = {
    "charge": 43,
    "e-mail": 31,
    "notification": 23,
    "refund": 5,
    "shipment": 38,
    "subscription": 25,
    "unsubscription": 2,
}


def demo(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run("demo", "--directory", str(folder), "--json", environment={}))
    return document


def effects(folder: Path) -> list[dict[str, Any]]:
    """What third parties did, each effect once for its key."""
    lines = (folder / "journal.jsonl").read_bytes().splitlines()
    return [entry for entry in map(json.loads, lines) if "key" in entry]


def check(document: dict[str, Any], folder: Path) -> None:
    sagas = {(each["saga"], each["status"]): each["count"] for each in document["sagas"]}
    assert sagas == EXPECTED_SAGAS
    assert document["third_parties"] == EXPECTED_EFFECTS
    done = effects(folder)
    assert max(Counter(effect["key"] for effect in done).values()) == 1, "an effect happened twice"
    by_kind = {
        kind: {effect["of"] for effect in done if effect["what"] == kind} for kind in ("charge", "refund", "shipment")
    }
    assert by_kind["charge"] == by_kind["refund"] | by_kind["shipment"], "money was kept for nothing"
    assert not by_kind["refund"] & by_kind["shipment"], "goods were given away"


def test_every_saga_ends_well(tmp_path: Path) -> None:
    """Failures at every step, and each saga is completed or compensated with all its effects."""
    check(demo(tmp_path), tmp_path)


def test_starting_it_again_changes_nothing(tmp_path: Path) -> None:
    """The same events again are duplicates: no second saga, no second e-mail."""
    demo(tmp_path)
    check(demo(tmp_path), tmp_path)


@pytest.mark.parametrize("kills", [(1,), (15, 40, 80, 120)], ids=["at the start", "four times"])
def test_kill_9_in_the_middle_loses_nothing_and_repeats_nothing(tmp_path: Path, kills: tuple[int, ...]) -> None:
    """Killed after so many effects of third parties, and started again on the same folder."""
    journal = tmp_path / "journal.jsonl"
    process = Process(tmp_path / "log", "demo", "--directory", str(tmp_path), "--json", environment={})
    with process:
        for number, lines in enumerate(kills):
            if number:
                process.start()

            def far_enough(lines: int = lines) -> bool:
                return journal.exists() and journal.read_bytes().count(b"\n") >= lines

            wait_until(far_enough, f"{lines} effects")
            process.kill9()
    check(demo(tmp_path), tmp_path)
