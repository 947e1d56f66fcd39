"""RabbitMQ loses everything: the database is enough to bring every saga to its end."""

from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine
from yarl import URL

from tests.support.base import RabbitMQ, wait_until
from tests.support.invariants import check_ledger
from tests.support.ledger_app import place_orders
from tests.support.processes import Process

pytestmark = pytest.mark.acceptance

APP = "tests.support.ledger_app:app"
ORDERS = 30


def test_f22_when_rabbitmq_has_lost_everything_the_database_is_enough(
    private_rabbitmq: RabbitMQ, private_amqp_url: str, pg_url: str, tmp_path: Path
) -> None:
    """Commands wait in queues, and are lost with them. No outbox has them any more: only deadlines send them again."""
    environment = {
        "COORDINATOR_BROKER_URL": private_amqp_url,
        "COORDINATOR_DATABASE_URL": pg_url,
        "LEDGER_URL": pg_url,
        "LEDGER_TIMEOUT": "2",
        "LEDGER_RESENDS": "8",
    }
    dsn = pg_url.replace("postgresql+asyncpg", "postgresql")
    vhost = URL(private_amqp_url).path.removeprefix("/")

    def ask(statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(dsn) as connection:
            return connection.execute(statement.encode()).fetchall()

    def waiting() -> int:
        queues: Any = private_rabbitmq.manage("GET", f"queues/{vhost}")
        return sum(queue.get("messages", 0) for queue in queues if "reserve" in queue["name"])

    with Process(tmp_path / "handlers", "run", APP, "--only", "handlers", environment=environment) as handlers:
        wait_until(lambda: "is running" in handlers.log, "the handlers, which make their queues")
        assert handlers.terminate() == 0
        with Process(tmp_path / "coordinator", "run", APP, "--only", "coordinator", environment=environment) as process:
            wait_until(lambda: "is running" in process.log, "the coordinator")
            database = create_engine(dsn.replace("postgresql://", "postgresql+psycopg://"))
            placed = place_orders(database, ORDERS)
            database.dispose()
            wait_until(lambda: ask("SELECT count(*) FROM saga_instance") == [(ORDERS,)], "all sagas")
            wait_until(lambda: waiting() > 0 and ask("SELECT count(*) FROM outbox") == [(0,)], "commands in the queue")
            private_rabbitmq.reset(private_amqp_url)
            handlers.start()
            ended = "SELECT count(*) FROM saga_instance WHERE status IN ('completed', 'compensated')"
            wait_until(lambda: ask(ended) == [(ORDERS,)], "the end of all sagas", 120)
            wait_until(lambda: ask("SELECT count(*) FROM outbox") == [(0,)], "an empty outbox")
        check_ledger(ask, ask, placed)
