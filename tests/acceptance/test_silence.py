"""Without faults nothing is said twice and nobody complains: redundancy would hide a bug, and this shows it.

SILENCE_SAGAS=10000 for many sagas (`make test-crash`); 1,000 otherwise.
"""

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from coordinator.settings import Settings
from events.bus import Outgoing
from events.clock import SystemClock
from events.codec import Limits
from events.envelope import wrap
from events.ids import TimeOrderedIds
from events.outbox import Outbound, route
from events.rabbitmq import RabbitMQBus
from events.relay import Entry, bundled
from tests.support.base import wait_until
from tests.support.ledger_app import OrderPlaced
from tests.support.processes import Process

pytestmark = pytest.mark.acceptance

APP = "tests.support.ledger_app:app"
SAGAS = int(os.environ.get("SILENCE_SAGAS", "1000"))


def starts(clock: SystemClock, ids: TimeOrderedIds) -> list[Outgoing]:
    entries = []
    for number in range(SAGAS):
        event = OrderPlaced(order_id=ids.new(), number=number)
        outbound = Outbound(wrap(event, id=str(ids.new()), source="/shop", time=clock.now()), route(event))
        entries.append(Entry(ids.new(), outbound.address, 64, outbound.encode(Limits()), None, None))
    return [bundle.outgoing() for bundle in bundled(entries, Limits(), share=2)]


async def publish(amqp_url: str) -> None:
    clock, ids = SystemClock(), TimeOrderedIds()
    bus = RabbitMQBus(amqp_url, namespace=Settings().namespace, clock=clock, ids=ids)
    await bus.open()
    try:
        assert not any(await bus.publish(starts(clock, ids)))
    finally:
        await bus.close()


def test_i20_a_run_without_faults_is_silent(amqp_url: str, pg_url: str, tmp_path: Path) -> None:
    environment = {
        "COORDINATOR_BROKER_URL": amqp_url,
        "COORDINATOR_DATABASE_URL": pg_url,
        "LEDGER_URL": pg_url,
        "LEDGER_TIMEOUT": "3600",
    }
    dsn = pg_url.replace("postgresql+asyncpg", "postgresql")

    def ask(statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(dsn) as connection:
            return connection.execute(statement.encode()).fetchall()

    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                Process(tmp_path / f"{part}{number}", "run", APP, "--only", part, environment=environment)
            )
            for part in ("coordinator", "handlers")
            for number in (1, 2)
        ]
        wait_until(lambda: all("is running" in process.log for process in processes), "the processes")
        asyncio.run(publish(amqp_url))
        ended = "SELECT count(*) FROM saga_instance WHERE status IN ('completed', 'compensated')"
        wait_until(lambda: ask(ended) == [(SAGAS,)], "the end of all sagas", 60 + SAGAS / 20)
        wait_until(lambda: ask("SELECT count(*) FROM outbox") == [(0,)], "an empty outbox")
        assert [process.terminate() for process in processes] == [0, 0, 0, 0]
        said = [line for process in processes for line in process.log.splitlines() if "is running" not in line]
    assert said == [], "neither a warning, nor a duplicate, nor a reconnect"
    assert ask("SELECT kind, count(*) FROM saga_history WHERE kind NOT IN ('started', 'reply') GROUP BY kind") == []
    assert ask("SELECT calls FROM ledger_outside WHERE calls > 1") == []
    assert ask("SELECT 1 FROM retry UNION ALL SELECT 1 FROM dead_letter") == []
