"""Operators watch handlers, pause them and set their limits while they run."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_cli import coordinator, event
from tests.support.base import RabbitMQ, free_port, wait_until
from tests.support.processes import Process

pytestmark = pytest.mark.acceptance

APP = "tests.support.ledger_app:app"
REFUSED = [
    (("pause", "nobody"), "no handler nobody runs here; known are: charge,"),
    (("set", "ship"), "say what to set"),
    (("set", "ship", "--rate", "0"), "a rate is more than 0"),
    (("set", "ship", "--concurrency", "0"), "at least one message at a time"),
    (("set", "ship", "--attempts", "0"), "attempts and crashes count from 1"),
    (("set", "ship", "--jitter", "some"), "jitter is full or none"),
]
ORDER = "01a20000-0000-7000-8000-00000000000{}"


@pytest.fixture
def on_servers(amqp_url: str, pg_url: str) -> dict[str, str]:
    return {"COORDINATOR_BROKER_URL": amqp_url, "COORDINATOR_DATABASE_URL": pg_url, "LEDGER_URL": pg_url}


@pytest.fixture
def processes(on_servers: dict[str, str], tmp_path: Path) -> Iterator[list[Process]]:
    """Two processes that run handlers, one of them the coordinator, too."""
    with ExitStack() as stack:
        started = [
            stack.enter_context(Process(tmp_path / f"{number}.log", "run", APP, *only, environment=on_servers))
            for number, only in enumerate([(), ("--only", "handlers")])
        ]
        wait_until(lambda: all("is running" in each.log for each in started), "the processes")
        yield started


def listed(environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    found = json.loads(coordinator(environment, "handlers", "list", "--json").stdout)["handlers"]
    return {each["name"]: each for each in found}


def statuses(environment: dict[str, str]) -> list[str]:
    found = json.loads(coordinator(environment, "sagas", "list", "--json").stdout)["sagas"]
    return sorted(each["status"] for each in found)


@pytest.mark.usefixtures("processes")
def test_a_paused_handler_takes_nothing_in_any_process_until_it_is_resumed(on_servers: dict[str, str]) -> None:
    def all_there() -> bool:
        return len(listed(on_servers).get("charge", {}).get("processes", [])) == 2

    wait_until(all_there, "both processes in the list")
    done = coordinator(on_servers, "handlers", "pause", "charge", "--why", "the bank asked", "--by", "ada")
    assert (done.returncode, done.stderr) == (0, "")

    def followed() -> bool:
        return all(process["paused"] for process in listed(on_servers)["charge"]["processes"])

    wait_until(followed, "all processes to follow")
    assert coordinator(on_servers, "publish", "-", given=event(ORDER.format(1), 1) + "\n").returncode == 0

    def charging() -> bool:
        shown = coordinator(on_servers, "sagas", "show", ORDER.format(1), "--json").stdout
        return bool(shown) and "charge_card" in json.loads(shown)["steps"]

    wait_until(charging, "the step of the paused handler")
    charge = listed(on_servers)["charge"]
    assert (charge["state"], charge["changed_by"], charge["reason"]) == ("paused", "ada", "the bank asked")
    assert statuses(on_servers) == ["running"]
    assert coordinator(on_servers, "handlers", "resume", "charge", "--by", "bob").returncode == 0
    wait_until(lambda: statuses(on_servers) == ["completed"], "the saga's end")
    changes = json.loads(coordinator(on_servers, "handlers", "changes", "--json").stdout)["changes"]
    assert [(each["changed_by"], each["change"]) for each in changes] == [
        ("bob", {"paused": False}),
        ("ada", {"paused": True}),
    ]


@pytest.mark.usefixtures("processes")
def test_limits_are_set_and_forgotten_and_what_is_of_no_use_is_refused_in_one_line(on_servers: dict[str, str]) -> None:
    wait_until(lambda: "ship" in listed(on_servers), "the handlers in the list")
    done = coordinator(
        on_servers, "handlers", "set", "ship", "--rate", "5", "--concurrency", "2", "--attempts", "4", "--why", "slow"
    )
    assert done.stdout == "ship: rate=5.0, concurrency=2, attempts=4; all processes follow within two seconds\n"
    table = coordinator(on_servers, "handlers", "list").stdout
    assert "rate=5.0, concurrency=2, attempts=4" in table
    done = coordinator(on_servers, "handlers", "set", "ship", "--reset")
    assert done.stdout == "ship: the limits of its code; all processes follow within two seconds\n"
    for arguments, says in REFUSED:
        refused = coordinator(on_servers, "handlers", *arguments)
        assert (refused.returncode, says in refused.stderr, refused.stderr.count("\n")) == (1, True, 1), refused.stderr
    assert listed(on_servers)["ship"]["set"] == {}
    assert "slow" in coordinator(on_servers, "handlers", "changes", "ship").stdout


def test_an_embedded_application_is_not_changed_behind_its_back(tmp_path: Path) -> None:
    """One process at a time writes to an SQLite file."""
    environment = {
        "COORDINATOR_DATABASE_URL": f"sqlite:///{tmp_path / 'coordinator.db'}",
        "LEDGER_URL": f"sqlite:///{tmp_path / 'ledger.db'}",
    }
    with Process(tmp_path / "log", "run", APP, environment=environment) as process:
        wait_until(lambda: "is running" in process.log, "the application")
        wait_until(lambda: "ship" in listed(environment), "the handlers in the list")
        refused = coordinator(environment, "handlers", "pause", "ship")
        assert (refused.returncode, "Another process works on this SQLite file" in refused.stderr) == (1, True)


def test_a_process_says_that_it_is_ready_and_why_it_is_not(
    private_amqp_url: str, pg_url: str, private_rabbitmq: RabbitMQ, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    environment = {
        "COORDINATOR_BROKER_URL": private_amqp_url,
        "COORDINATOR_DATABASE_URL": pg_url,
        "LEDGER_URL": pg_url,
        "COORDINATOR_HEALTH": address,
    }

    def look(path: str) -> tuple[int, dict[str, Any]]:
        try:
            with urllib.request.urlopen(f"http://{address}/{path}", timeout=10) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    with Process(tmp_path / "log", "run", APP, environment=environment) as process:
        wait_until(lambda: look("live") == (200, {"live": True}), "the process to live")
        status, document = look("ready")
        assert (status, document["ready"], document["problems"]) == (200, True, []), process.log
        assert document["handlers"]["charge"] == {"running": 0, "paused": False}
        assert look("secrets")[0] == 404
        private_rabbitmq.kill9()
        wait_until(lambda: look("ready")[0] == 503, "the process to see that its broker is gone")
        assert "RabbitMQ" in look("ready")[1]["problems"][0]
        assert look("live")[0] == 200
        private_rabbitmq.start()
        wait_until(lambda: look("ready")[0] == 200, "the process to be ready again")
