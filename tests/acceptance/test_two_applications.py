"""Two applications on one broker, each with a database and a coordinator of its own."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support.base import Postgres, wait_until
from tests.support.processes import Process, run

pytestmark = pytest.mark.acceptance

APPS = ("shop", "warehouse")
ORDERS = 30


@pytest.fixture
def databases(postgres: Postgres) -> Iterator[dict[str, str]]:
    with postgres.database() as shop, postgres.database() as warehouse:
        yield {"shop": shop, "warehouse": warehouse}


def test_each_coordinator_gets_the_answers_to_its_own_commands_and_both_hear_of_every_event(
    amqp_url: str, databases: dict[str, str], tmp_path: Path
) -> None:
    """A saga of one is the child of a saga of the other, is answered there, and undone from there."""
    environments = {
        app: {"COORDINATOR_BROKER_URL": amqp_url, "COORDINATOR_DATABASE_URL": url} for app, url in databases.items()
    }
    lines = tmp_path / "orders.jsonl"
    lines.write_text(
        "".join(
            json.dumps(
                {
                    "specversion": "1.0",
                    "id": f"placed-{number}",
                    "source": "/till",
                    "type": "order.placed",
                    "data": {"order": f"o-{number}", "number": number},
                }
            )
            + "\n"
            for number in range(ORDERS)
        )
    )

    def ask(app: str, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(databases[app].replace("postgresql+asyncpg", "postgresql")) as connection:
            return connection.execute(statement.encode()).fetchall()

    def ended(app: str) -> Counter[tuple[str, str]]:
        return Counter((saga, status) for saga, status in ask(app, "SELECT saga, status FROM saga_instance"))

    undone = len(range(0, ORDERS, 3))
    expected = {
        "shop": {("order", "completed"): ORDERS - undone, ("order", "compensated"): undone},
        "warehouse": {
            ("packing", "completed"): ORDERS - undone,
            ("packing", "compensated"): undone,
            ("statistics", "completed"): ORDERS,
        },
    }
    processes = {
        app: Process(tmp_path / app, "run", f"tests.support.two_apps:{app}", environment=environments[app])
        for app in APPS
    }
    with processes["shop"], processes["warehouse"]:
        wait_until(lambda: all("is running" in each.log for each in processes.values()), "both applications")
        run("publish", str(lines), environment=environments["shop"])
        wait_until(lambda: all(ended(app) == expected[app] for app in APPS), f"the end of all sagas: {expected}", 60)
        empty = [(0,)]
        wait_until(lambda: all(ask(app, "SELECT count(*) FROM outbox") == empty for app in APPS), "empty outboxes")
    for app in APPS:
        assert ask(app, "SELECT reason, detail FROM dead_letter") == []
        run("verify", environment=environments[app])
