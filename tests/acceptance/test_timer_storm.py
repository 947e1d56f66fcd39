"""Many deadlines in the same second, and several processes that see them: each fires once, and none before its time.

TIMER_STORM=100000 with eight processes (`make test-crash`); 2,000 with three otherwise.
"""

import asyncio
import os
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from coordinator.chain import HistoryRow, history_row
from coordinator.decide import start
from coordinator.decision import Started
from coordinator.instance import Instance
from coordinator.settings import Settings
from coordinator.store import Store
from events.bus import Delivery
from events.clock import SystemClock
from events.codec import Limits, Readable, read_body
from events.database import open_database, transaction
from events.ids import TimeOrderedIds
from events.rabbitmq import RabbitMQBus
from tests.support.base import wait_until
from tests.support.counts import note
from tests.support.ledger_app import TIMEOUT, Order, OrderPlaced, app, release
from tests.support.processes import Process, run

pytestmark = pytest.mark.acceptance

APP = "tests.support.ledger_app:app"
SAGAS = int(os.environ.get("TIMER_STORM", "2000"))
PROCESSES = 8 if SAGAS >= 100_000 else 3
CHUNK = 1000


def begun(at: datetime, number: int, ids: TimeOrderedIds) -> tuple[Instance, HistoryRow]:
    """A saga that waits for the answer to its first step, as its start has left it."""
    given = Started(ids.new(), OrderPlaced(order_id=ids.new(), number=number), f"m-{number}", at)
    decision = start(Order.definition, given)
    row = history_row(decision.instance.id, 1, decision.entry, given=None, head=b"")
    return replace(decision.instance, head=row[-1]), row


async def prepare(pg_url: str, amqp_url: str) -> datetime:
    """Write sagas whose deadlines are all at one time to come; return that."""
    engine, clock, ids = open_database(pg_url), SystemClock(), TimeOrderedIds()
    store = Store(engine, clock)
    await store.clock.calibrate()
    # Time enough to write them, and for all processes to be up before.
    due_at = (store.clock.now() + timedelta(seconds=45 + SAGAS / 500)).replace(microsecond=0)
    for first in range(0, SAGAS, CHUNK):
        made = [
            begun(due_at - timedelta(seconds=TIMEOUT), number, ids)
            for number in range(first, min(SAGAS, first + CHUNK))
        ]
        async with transaction(engine) as connection:
            await store.insert(connection, [instance for instance, _ in made])
            await store.record(connection, [row for _, row in made])
    await engine.dispose()
    bus = RabbitMQBus(amqp_url, namespace=Settings().namespace, application=app.name, clock=clock, ids=ids)
    await bus.open()
    await bus.declare([release.queue])
    await bus.close()
    return due_at


async def commands(amqp_url: str) -> Counter[str]:
    """Read the ids of all commands that were sent, until as many have come as there are sagas."""
    bus = RabbitMQBus(
        amqp_url, namespace=Settings().namespace, application=app.name, clock=SystemClock(), ids=TimeOrderedIds()
    )
    found: Counter[str] = Counter()
    complete = asyncio.Event()

    def deliver(delivery: Delivery) -> None:
        about = {"content_type": delivery.content_type, "encoding": delivery.content_encoding}
        parts = read_body(delivery.body, headers=delivery.headers, limits=Limits(), **about)
        found.update(part.envelope.id for part in parts if isinstance(part, Readable))
        if found.total() >= SAGAS:
            complete.set()

    await bus.open()
    try:
        await bus.declare([release.queue])
        await bus.consume(release.queue.name, deliver, prefetch=0)
        async with asyncio.timeout(120):
            await complete.wait()
    finally:
        await bus.close()
    return found


def test_i12_a_storm_of_deadlines_fires_each_once_and_none_too_early(
    amqp_url: str, pg_url: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    environment = {
        "COORDINATOR_BROKER_URL": amqp_url,
        "COORDINATOR_DATABASE_URL": pg_url,
        "LEDGER_URL": pg_url,
        "LEDGER_TIMEOUT": "36000",
    }
    dsn = pg_url.replace("postgresql+asyncpg", "postgresql")

    def ask(statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(dsn) as connection:
            return connection.execute(statement.encode()).fetchall()

    run("db", "upgrade", environment=environment)
    due_at = asyncio.run(prepare(pg_url, amqp_url))
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                Process(tmp_path / f"coordinator{number}", "run", APP, "--only", "coordinator", environment=environment)
            )
            for number in range(PROCESSES)
        ]
        wait_until(lambda: all("is running" in process.log for process in processes), "the processes", 120)
        [(early,)] = ask("SELECT clock_timestamp()")
        assert early < due_at, "all processes are there when it begins"
        assert ask("SELECT count(*) FROM saga_history WHERE kind = 'deadline'") == [(0,)]
        fired = "SELECT count(*) FROM saga_history WHERE kind = 'deadline'"
        wait_until(lambda: ask(fired)[0][0] >= SAGAS, "the end of the storm", 120 + SAGAS / 100)
        wait_until(lambda: ask("SELECT count(*) FROM outbox") == [(0,)], "an empty outbox", 300)
        assert [process.terminate() for process in processes] == [0] * PROCESSES
        said = [line for process in processes for line in process.log.splitlines() if "is running" not in line]
    assert said == []
    sums = "SELECT count(*), count(DISTINCT saga_id), min(at), max(at) FROM saga_history WHERE kind = 'deadline'"
    [(rows, sagas, first, last)] = ask(sums)
    assert (rows, sagas) == (SAGAS, SAGAS)
    assert first >= due_at
    assert ask("SELECT status, revision, count(*) FROM saga_instance GROUP BY 1, 2") == [("compensating", 2, SAGAS)]
    sent = asyncio.run(commands(amqp_url))
    assert len(sent) == sent.total() == SAGAS
    note(pytestconfig, f"timers: {SAGAS} fired by {PROCESSES} processes within {(last - due_at).total_seconds():.1f} s")
