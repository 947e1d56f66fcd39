"""Processes and servers are killed under load; afterwards every saga has ended, and every effect happened once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from coordinator.settings import Settings
from events import Publisher, PublishError
from events.clock import SystemClock
from events.codec import Limits
from events.ids import TimeOrderedIds
from events.rabbitmq import RabbitMQBus
from tests.support.base import Postgres, RabbitMQ, wait_until
from tests.support.ledger_app import OrderPlaced
from tests.support.processes import Process

pytestmark = pytest.mark.acceptance

ORDERS = 400
APP = "tests.support.ledger_app:app"


class Cluster:
    """Two coordinators and two handler processes on one broker and one database, and orders coming in."""

    def __init__(self, amqp_url: str, pg_url: str, folder: Path) -> None:
        self.amqp_url = amqp_url
        self.dsn = pg_url.replace("postgresql+asyncpg", "postgresql")
        environment = {
            "COORDINATOR_BROKER_URL": amqp_url,
            "COORDINATOR_DATABASE_URL": pg_url,
            "LEDGER_URL": pg_url,
        }
        self.processes = {
            f"{part} {number}": Process(
                folder / f"{part}{number}.log", "run", APP, "--only", part, environment=environment
            )
            for part in ("coordinator", "handlers")
            for number in (1, 2)
        }
        self.ids = TimeOrderedIds()
        self.placed: list[UUID] = []
        self.allowed = ORDERS // 4

    async def place(self) -> None:
        """Publish orders, each until the broker has confirmed it, and no more than are allowed so far."""
        clock = SystemClock()
        bus = RabbitMQBus(self.amqp_url, namespace=Settings().namespace, clock=clock, ids=self.ids)
        await bus.open()
        publisher = Publisher(bus, "/shop", clock=clock, ids=self.ids, limits=Limits())
        try:
            for number in range(ORDERS):
                while number >= self.allowed:
                    await clock.sleep(0.01)
                event = OrderPlaced(order_id=self.ids.new(), number=number)
                self.placed.append(event.order_id)
                while True:
                    try:
                        await publisher.publish(event, id=str(event.order_id))
                        break
                    except PublishError:
                        await clock.sleep(0.2)
        finally:
            await bus.close()

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return connection.execute(statement.encode()).fetchall()

    def ready(self) -> bool:
        """Whether all four processes have declared their queues and made their tables."""
        return all("is running" in process.log for process in self.processes.values())

    async def come_under_load(self, share: float) -> None:
        """Wait until that share of all orders is done, and let more come in: what happens next happens under load."""
        await asyncio.to_thread(self.wait_for_finished, int(ORDERS * share))
        self.allowed = max(self.allowed, int(ORDERS * (share + 0.25)))

    def finished(self) -> int:
        return int(self.query("SELECT count(*) FROM saga_instance WHERE due_at IS NULL")[0][0])

    def wait_for_finished(self, number: int, seconds: float = 120) -> None:
        def enough() -> bool:
            try:
                return self.finished() >= number
            except psycopg.Error:  # the database is just being restarted
                return False

        wait_until(enough, f"{number} finished sagas", seconds)


@pytest.fixture
def cluster(private_amqp_url: str, private_pg_url: str, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(private_amqp_url, private_pg_url, tmp_path)
    with ExitStack() as stack:
        for process in cluster.processes.values():
            stack.enter_context(process)
        wait_until(cluster.ready, "the processes", 60)
        yield cluster


@pytest.fixture
async def orders(cluster: Cluster) -> AsyncIterator[asyncio.Task[None]]:
    """Orders that come in while the test goes on."""
    task = asyncio.create_task(cluster.place())
    yield task
    task.cancel()


async def finish(cluster: Cluster, orders: asyncio.Task[None]) -> None:
    cluster.allowed = ORDERS
    await orders
    await asyncio.to_thread(cluster.wait_for_finished, ORDERS)
    wait_until(lambda: not cluster.query("SELECT 1 FROM outbox LIMIT 1"), "an empty outbox", 60)


def check(cluster: Cluster) -> None:
    """Check what must hold whatever happened (the numbers are those of the list of invariants)."""
    sagas = {
        key: (status, state) for key, status, state in cluster.query("SELECT key, status, state FROM saga_instance")
    }
    assert set(sagas) == {str(order) for order in cluster.placed}, "I1, I8: nothing lost, nothing invented"
    effects: dict[str, Counter[str]] = {key: Counter() for key in sagas}
    for order, what in cluster.query(
        "SELECT order_id, what FROM ledger_inside UNION ALL SELECT order_id, what FROM ledger_outside"
    ):
        effects[str(order)][what] += 1
    for key, (status, state) in sagas.items():
        if state["number"] % 5:
            assert status == "completed", f"I1: {key}"
            assert effects[key] == {"reserve": 1, "charge": 1, "ship": 1}, f"I2: {key}"
        else:
            assert status == "compensated", f"I1: {key}"
            assert effects[key] == {"reserve": 1, "charge": 1, "refund": 1, "release": 1}, f"I3: {key}"
    gaps = cluster.query(
        "SELECT i.id FROM saga_instance i JOIN saga_history h ON h.saga_id = i.id GROUP BY i.id, i.revision"
        " HAVING count(*) <> i.revision OR max(h.revision) <> i.revision"
    )
    assert not gaps, "I10: a history has gaps"
    assert not cluster.query("SELECT reason, detail FROM dead_letter"), "I16: nothing was given up on"


async def test_every_process_killed_in_turn(cluster: Cluster, orders: asyncio.Task[None]) -> None:
    """kill -9 of each coordinator and each handler process under load loses nothing and repeats nothing."""
    for number, process in enumerate(cluster.processes.values(), 1):
        await cluster.come_under_load(number / 6)
        process.restart_after_kill9()
    await finish(cluster, orders)
    check(cluster)


async def test_broker_killed_and_restarted(
    cluster: Cluster, orders: asyncio.Task[None], private_rabbitmq: RabbitMQ
) -> None:
    """kill -9 and a clean restart of the broker under load lose nothing."""
    await asyncio.to_thread(private_rabbitmq.flush)
    await cluster.come_under_load(1 / 8)
    await asyncio.to_thread(private_rabbitmq.kill9)
    await asyncio.to_thread(private_rabbitmq.start)
    await cluster.come_under_load(3 / 8)
    await asyncio.to_thread(private_rabbitmq.restart)
    await cluster.come_under_load(5 / 8)
    await finish(cluster, orders)
    check(cluster)


async def test_database_killed_and_restarted(
    cluster: Cluster, orders: asyncio.Task[None], private_postgres: Postgres
) -> None:
    """kill -9 and a clean restart of the database under load lose nothing."""
    await cluster.come_under_load(1 / 8)
    await asyncio.to_thread(private_postgres.kill9)
    await asyncio.to_thread(private_postgres.start)
    await cluster.come_under_load(3 / 8)
    await asyncio.to_thread(private_postgres.restart)
    await cluster.come_under_load(5 / 8)
    await finish(cluster, orders)
    check(cluster)


async def test_sigterm_finishes_what_runs_and_exits_with_0(cluster: Cluster, orders: asyncio.Task[None]) -> None:
    """A rolling restart with SIGTERM loses nothing; every process says goodbye with 0."""
    for number, process in enumerate(cluster.processes.values(), 1):
        await cluster.come_under_load(number / 6)
        assert await asyncio.to_thread(process.terminate) == 0, process.log
        process.start()
    await finish(cluster, orders)
    check(cluster)
