"""The command line as a person and as a program use it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.base import free_port, wait_until
from tests.support.processes import COMMAND, Process, finish

pytestmark = pytest.mark.acceptance

APP = "tests.support.ledger_app:app"
ORDER = "01a20000-0000-7000-8000-000000000005"


def coordinator(environment: dict[str, str], *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return finish(*arguments, environment={"COLUMNS": "200", **environment}, given=given)


def event(order: str, number: int, **more: object) -> str:
    document = {
        "specversion": "1.0",
        "id": order,
        "source": "/shop",
        "type": "order.placed",
        "data": {"order_id": order, "number": number},
        **more,
    }
    return json.dumps(document)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    url = f"sqlite:///{tmp_path / 'coordinator.db'}"
    return {"COORDINATOR_DATABASE_URL": url, "LEDGER_URL": f"sqlite:///{tmp_path / 'ledger.db'}"}


@pytest.fixture
def on_servers(amqp_url: str, pg_url: str) -> dict[str, str]:
    return {"COORDINATOR_BROKER_URL": amqp_url, "COORDINATOR_DATABASE_URL": pg_url, "LEDGER_URL": pg_url}


def test_a_saga_from_standard_input_to_its_chart(on_servers: dict[str, str], tmp_path: Path) -> None:
    """publish -, then list, show and chart, for people and for programs."""
    with Process(tmp_path / "log", "run", APP, environment=on_servers) as process:
        wait_until(lambda: "is running" in process.log, "the application")
        published = coordinator(on_servers, "publish", "-", "--app", APP, given=event(ORDER, 5) + "\n")
        assert (published.returncode, published.stdout) == (0, "1 published, 0 not\n"), published.stderr

        def compensated() -> bool:
            found = coordinator(on_servers, "sagas", "list", "--status", "compensated", "--json")
            return bool(json.loads(found.stdout)["sagas"])

        wait_until(compensated, "the saga's end")
        assert process.terminate() == 0, process.log
    [saga] = json.loads(coordinator(on_servers, "sagas", "list", "--json").stdout)["sagas"]
    assert (saga["saga"], saga["key"], saga["status"]) == ("order", ORDER, "compensated")
    table = coordinator(on_servers, "sagas", "list").stdout
    assert saga["id"] in table
    assert "compensated" in table
    shown = json.loads(coordinator(on_servers, "sagas", "show", ORDER, "--json").stdout)
    assert [row["revision"] for row in shown["history"]] == [1, 2, 3, 4, 5, 6]
    assert shown["reason"] == "ship_goods declined: no such address"
    assert "ship_goods declined" in coordinator(on_servers, "sagas", "show", saga["id"]).stdout
    chart = coordinator(on_servers, "sagas", "chart", APP, "--of", ORDER).stdout
    assert "class do_ship_goods failed" in chart
    assert "class undo_charge_card done" in chart
    text = coordinator(on_servers, "sagas", "chart", APP, "--of", ORDER, "--format", "ascii").stdout.splitlines()
    assert "[!] ship_goods: declined" in text
    assert "[x] compensated" in [each[:15] for each in text]


def test_lines_that_are_no_events_are_named_and_the_rest_is_published(environment: dict[str, str]) -> None:
    lines = [event(ORDER, 1), "nonsense", event(ORDER, 1, type="order.plcaed"), event(ORDER, 1, data={"number": "x"})]
    done = coordinator(environment, "publish", "-", "--app", APP, "--json", given="\n".join(lines))
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"published": 1, "problems": 3}
    complaints = done.stderr.splitlines()
    assert complaints[0].startswith("line 2: the body is not JSON")
    assert complaints[1].startswith("line 3: nobody here knows the type 'order.plcaed'")
    assert complaints[2].startswith("line 4: OrderPlaced: order_id: Field required")


def test_the_schema_is_upgraded_and_named(environment: dict[str, str]) -> None:
    before = coordinator(environment, "db", "current")
    assert before.returncode == 1
    assert "there is no database file" in before.stderr
    assert coordinator(environment, "db", "upgrade").returncode == 0
    document = json.loads(coordinator(environment, "db", "current", "--json").stdout)
    assert document["current"] == document["needed"]


def test_the_relay_alone_publishes_what_a_service_has_committed(on_servers: dict[str, str], tmp_path: Path) -> None:
    """A service without an event loop, a database with an outbox, and `coordinator relay`."""
    assert coordinator(on_servers, "db", "upgrade").returncode == 0
    script = tmp_path / "service.py"
    script.write_text(
        "import os, sqlalchemy as sa\n"
        "from sqlalchemy.orm import Session\n"
        "from events import ServiceOutbox\n"
        "from tests.support.ledger_app import OrderPlaced\n"
        "url = os.environ['COORDINATOR_DATABASE_URL'].replace('+asyncpg', '+psycopg')\n"
        "with Session(sa.create_engine(url)) as session, session.begin():\n"
        f"    ServiceOutbox('/shop').add(session, OrderPlaced(order_id='{ORDER}', number=1))\n"
    )
    with Process(tmp_path / "app.log", "run", APP, "--only", "coordinator", environment=on_servers) as app:
        wait_until(lambda: "is running" in app.log, "the application")
        app.kill9()  # its queues are there now; nobody sweeps the outbox
    python = [COMMAND[0], str(script)]
    service = {**os.environ, **on_servers, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(python, env=service, check=True)
    with Process(tmp_path / "relay.log", "relay", environment=on_servers) as relay:
        with Process(tmp_path / "app.log", "run", APP, environment=on_servers):

            def completed() -> bool:
                return bool(json.loads(coordinator(on_servers, "sagas", "list", "--json").stdout)["sagas"])

            wait_until(completed, "the saga")
        assert relay.terminate() == 0, relay.log


@pytest.mark.parametrize("arguments", [["run", APP], ["relay"]])
def test_a_process_can_be_stopped_as_soon_as_it_says_that_it_runs(
    environment: dict[str, str], arguments: list[str]
) -> None:
    """Once it was killed by a SIGTERM that came at once, instead of ending well."""
    script = (
        "import os, signal, sys; from coordinator import cli;"
        " cli.out.print = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM); cli.main()"
    )
    python = {**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([COMMAND[0], "-c", script, *arguments], env=python, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("variables", "arguments", "says"),
    [
        ({"COORDINATOR_BROKER_URL": "http://x"}, ["run", APP], "COORDINATOR_BROKER_URL: write amqp://"),
        ({"COORDINATOR_DATABASE_URL": "mysql://u:hush@x/y"}, ["sagas", "list"], "COORDINATOR_DATABASE_URL: write"),
        ({"COORDINATOR_DATABASE_URL": "postgresql://u:hush@127.0.0.1:1/y"}, ["sagas", "list"], "cannot be reached"),
        (
            {"COORDINATOR_BROKER_URL": "amqp://u:hush@127.0.0.1:1/", "COORDINATOR_WAIT": "0"},
            ["run", APP],
            "cannot be reached",
        ),
        ({"COORDINATOR_MAX_BODY": "1"}, ["run", APP], "COORDINATOR_MAX_BODY"),
        ({}, ["run", "nosuch.module:app"], "there is no module 'nosuch.module'"),
        ({}, ["run", "tests.support.ledger_app:nothing"], "is no App"),
        ({}, ["run", "shop"], "write module:attribute"),
        ({}, ["run", APP, "--handler", "nobody"], "has no handler called nobody"),
        ({}, ["run", APP, "--only", "half"], "--only takes coordinator or handlers"),
        ({}, ["publish", "nosuch.jsonl"], "there is no file nosuch.jsonl"),
        ({}, ["sagas", "chart", APP, "nosuch"], "has no saga called nosuch; it has: order"),
    ],
)
def test_errors_are_one_line_that_says_what_to_do(
    environment: dict[str, str], variables: dict[str, str], arguments: list[str], says: str
) -> None:
    done = coordinator({**environment, **variables}, *arguments)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert "hush" not in line


def test_a_second_process_on_the_same_sqlite_file_is_refused(environment: dict[str, str], tmp_path: Path) -> None:
    with Process(tmp_path / "log", "run", APP, environment=environment) as process:
        wait_until(lambda: "is running" in process.log, "the application")
        second = coordinator(environment, "run", APP)
        assert second.returncode == 1
        assert "Another process works on this SQLite file" in second.stderr
        assert coordinator(environment, "sagas", "list").returncode == 0, "looking is allowed"
        assert process.terminate() == 0


def test_an_application_that_is_started_before_its_broker_waits_for_it(
    environment: dict[str, str], tmp_path: Path
) -> None:
    away = {**environment, "COORDINATOR_BROKER_URL": f"amqp://127.0.0.1:{free_port()}/", "COORDINATOR_WAIT": "300"}
    with Process(tmp_path / "log", "run", APP, environment=away) as process:
        wait_until(lambda: "waits for a server" in process.log, "the first try")
        assert "is running" not in process.log
