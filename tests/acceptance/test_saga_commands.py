"""Operators step into sagas with the command line, beside the processes that run them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_cli import coordinator, event
from tests.support.base import wait_until
from tests.support.processes import Process

pytestmark = pytest.mark.acceptance

APP = "tests.support.ledger_app:app"
ORDER = "01a20000-0000-7000-8000-000000000001"


@pytest.fixture
def on_servers(amqp_url: str, pg_url: str) -> dict[str, str]:
    return {"COORDINATOR_BROKER_URL": amqp_url, "COORDINATOR_DATABASE_URL": pg_url, "LEDGER_URL": pg_url}


@pytest.fixture
def running(on_servers: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """An application at work, in which the saga of one order waits for a handler that is paused."""
    with Process(tmp_path / "log", "run", APP, environment=on_servers) as process:
        wait_until(lambda: "is running" in process.log, "the process")

        def is_paused() -> bool:
            found = json.loads(coordinator(on_servers, "handlers", "list", "--json").stdout)["handlers"]
            return any(each["paused"] for handler in found for each in handler["processes"])

        assert coordinator(on_servers, "handlers", "pause", "charge", "--by", "ada").returncode == 0
        wait_until(is_paused, "the pause")
        assert coordinator(on_servers, "publish", "-", given=event(ORDER, 1) + "\n").returncode == 0
        wait_until(lambda: "charge_card" in shown(on_servers).get("steps", {}), "the step of the paused handler")
        yield on_servers


def shown(environment: dict[str, str], order: str = ORDER) -> dict[str, Any]:
    printed = coordinator(environment, "sagas", "show", order, "--json").stdout
    found: dict[str, Any] = json.loads(printed) if printed else {}
    return found


def test_a_saga_is_cancelled_while_it_runs_and_ends_undone(running: dict[str, str]) -> None:
    moved = coordinator(
        running,
        "sagas",
        "move-deadline",
        APP,
        ORDER,
        "charge_card",
        "2100-01-01",
        "--why",
        "the bank is shut",
        "--by",
        "ada",
    )
    assert (moved.returncode, moved.stderr) == (0, "")
    revision = str(shown(running)["revision"])
    cancel = ("sagas", "cancel", APP, ORDER, "--why", "the customer called", "--by", "ada")
    cancelled = coordinator(running, *cancel, "--revision", revision)
    assert (cancelled.returncode, cancelled.stderr) == (0, "")
    assert "ada: the customer called" in cancelled.stdout
    for arguments, said in (
        ((*cancel, "--revision", revision), "the saga has moved on: it is at revision"),
        (cancel, "only a running saga can be cancelled; this one is compensating"),
        (("sagas", "skip", APP, ORDER, "ship_goods", "--why", "x"), "the saga has begun no step 'ship_goods'"),
        (
            ("sagas", "retry", APP, "no-such", "ship_goods", "--why", "x"),
            "there is no saga with the id or business key",
        ),
        (("sagas", "compensate", APP, ORDER, "--why", " "), "say who does this, and why"),
    ):
        refused = coordinator(running, *arguments)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert said in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert coordinator(running, "handlers", "resume", "charge", "--by", "ada").returncode == 0
    wait_until(lambda: shown(running)["status"] == "compensated", "the saga's end")
    acts = [(row["kind"], row["actor"], row["why"]) for row in shown(running)["history"] if row["actor"]]
    assert acts == [("move_deadline", "ada", "the bank is shut"), ("cancel", "ada", "the customer called")]
    assert shown(running)["steps"]["charge_card"]["status"] == "undone"


def test_many_sagas_are_acted_on_at_once_and_their_timers_seen_and_moved(running: dict[str, str]) -> None:
    orders = [f"01a20000-0000-7000-8000-{number:012}" for number in range(2, 6)]
    lines = "\n".join(event(order, number) for number, order in enumerate(orders, 2))
    assert coordinator(running, "publish", "-", given=lines + "\n").returncode == 0
    charging = ("--step", "charge_card=running")

    def all_wait() -> bool:
        printed = coordinator(running, "timers", "list", *charging, "--json").stdout
        return len({each["id"] for each in json.loads(printed)["timers"]}) == 5

    wait_until(all_wait, "the steps of the paused handler")
    why = ("--why", "the bank is shut", "--by", "ada")
    moved = coordinator(running, "timers", "move", APP, "2100-01-01T12:00", *charging, *why)
    assert (moved.returncode, moved.stderr, moved.stdout.splitlines()[-1]) == (0, "", "5 done; 0 refused")
    own = coordinator(running, "timers", "move", APP, ORDER, "2099-01-01", *why)
    assert (own.returncode, own.stderr) == (0, "")
    cancelled = coordinator(running, "timers", "cancel", APP, orders[0], "--step", "charge_card", *why)
    assert (cancelled.returncode, cancelled.stderr) == (0, "")
    listed = json.loads(coordinator(running, "timers", "list", "--json").stdout)["timers"]
    assert [(each["step"], each["due_at"][:16]) for each in listed] == [
        (None, "2099-01-01T00:00"),
        *[("charge_card", "2100-01-01T12:00")] * 4,
    ]
    assert "the saga turns back" in coordinator(running, "timers", "list").stdout

    ledger = ("--saga", "order", "--status", "running")
    planned = coordinator(running, "sagas", "cancel", APP, *ledger, *why, "--dry-run")
    assert planned.stdout.splitlines()[-1] == "5 would be done, nothing was changed; 0 refused"
    assert {shown(running, order)["status"] for order in (ORDER, *orders)} == {"running"}
    done = coordinator(running, "sagas", "cancel", APP, *ledger, *why, "--rate", "50", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    *outcomes, added_up = map(json.loads, done.stdout.splitlines())
    assert {(each["status"], each["refused"]) for each in outcomes} == {("compensating", None)}
    assert added_up == {"done": 5, "refused": 0, "stopped": False, "dry_run": False}
    again = coordinator(running, "sagas", "cancel", APP, "--saga", "order", *why)
    assert (again.returncode, again.stdout.splitlines()[-1]) == (1, "0 done; 5 refused")
    assert "only a running saga can be cancelled; this one is compensating" in again.stdout


def test_ctrl_c_stops_a_paced_act_between_two_sagas_and_says_how_far_it_came(
    running: dict[str, str], tmp_path: Path
) -> None:
    orders = [f"01a20000-0000-7000-8000-{number:012}" for number in range(2, 5)]
    lines = "\n".join(event(order, number) for number, order in enumerate(orders, 2))
    assert coordinator(running, "publish", "-", given=lines + "\n").returncode == 0
    wait_until(lambda: all("charge_card" in shown(running, each).get("steps", {}) for each in orders), "all steps")
    paced = ("sagas", "cancel", APP, "--status", "running", "--why", "x", "--rate", "0.001")
    with Process(tmp_path / "paced", *paced, environment=running) as process:
        wait_until(lambda: "done " in process.log, "the first one")
        assert process.interrupt() == 130
        assert process.log.splitlines()[-1] == "1 done; 0 refused; stopped before the end: run it again to go on"
    statuses = sorted(shown(running, each)["status"] for each in (ORDER, *orders))
    assert statuses == ["compensating", "running", "running", "running"]
