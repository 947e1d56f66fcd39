"""Poison among good messages: the good ones are handled once, the poison ends as dead letters with its reason.

`POISON_SECONDS=60 pytest tests/acceptance/test_poison.py` for a longer load; POISON_SECONDS is 10 otherwise.
"""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from coordinator.settings import Settings
from events import Publisher
from events.clock import SystemClock
from events.codec import Limits
from events.ids import TimeOrderedIds
from events.rabbitmq import RabbitMQBus
from tests.support.base import wait_until
from tests.support.poison_app import Kind, Work
from tests.support.processes import Process

pytestmark = pytest.mark.acceptance

SECONDS = float(os.environ.get("POISON_SECONDS", "10"))
RATE = 60  # messages a second, one in a hundred of them poison
POISON = [Kind.RAISES, Kind.HANGS, Kind.KILLS]


async def keep_alive(processes: list[Process]) -> None:
    """Start again who has ended, as systemd does; nobody does it by hand."""
    clock = SystemClock()
    while True:
        for process in processes:
            if process.has_ended:
                process.start()
        await clock.sleep(0.2)


@pytest.fixture
async def processes(amqp_url: str, pg_url: str, tmp_path: Path) -> AsyncIterator[list[Process]]:
    environment = {
        "COORDINATOR_BROKER_URL": amqp_url,
        "COORDINATOR_DATABASE_URL": pg_url,
        "COORDINATOR_LOG_LEVEL": "WARNING",
    }
    with ExitStack() as stack:
        started = [
            Process(tmp_path / f"{number}.log", "run", "tests.support.poison_app:app", environment=environment)
            for number in (1, 2)
        ]
        for process in started:
            stack.enter_context(process)
        wait_until(lambda: all("is running" in process.log for process in started), "the processes")
        keeper = asyncio.create_task(keep_alive(started))
        yield started
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)


async def publish(amqp_url: str) -> list[Work]:
    """Publish evenly for as long as the test is to last."""
    clock, ids = SystemClock(), TimeOrderedIds()
    bus = RabbitMQBus(amqp_url, namespace=Settings().namespace, clock=clock, ids=ids)
    await bus.open()
    publisher = Publisher(bus, "/poison", clock=clock, ids=ids, limits=Limits())
    sent = []
    begun = clock.monotonic()
    for number in range(int(SECONDS * RATE)):
        kind = POISON[number // 100 % 3] if number % 100 == 50 else Kind.GOOD
        sent.append(Work(number=number, kind=kind))
        await publisher.publish(sent[-1])
        await clock.sleep(max(0, begun + number / RATE - clock.monotonic()))
    await bus.close()
    return sent


async def test_f47_poison_ends_as_dead_letters_and_all_others_are_handled_once(
    amqp_url: str, pg_url: str, processes: list[Process]
) -> None:
    sent = await publish(amqp_url)
    good = [work.number for work in sent if work.kind is Kind.GOOD]
    poison = Counter(work.kind for work in sent if work.kind is not Kind.GOOD)
    assert poison.keys() == set(POISON)
    dsn = pg_url.replace("postgresql+asyncpg", "postgresql")

    def ask(statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(dsn) as connection:
            return connection.execute(statement.encode()).fetchall()

    def is_over() -> bool:
        return len(ask("SELECT 1 FROM dead_letter")) == poison.total() and not ask("SELECT 1 FROM retry LIMIT 1")

    await asyncio.to_thread(wait_until, is_over, "the end of all poison", 120 + 30 * poison[Kind.KILLS])
    assert sorted(number for (number,) in ask("SELECT number FROM poison_handled")) == good, processes[0].log[-3000:]
    letters = ask("SELECT reason, error_type, attempts FROM dead_letter")
    assert Counter(letter[:2] for letter in letters) == {
        ("failed", "ValueError"): poison[Kind.RAISES],
        ("failed", "TimeoutError"): poison[Kind.HANGS],
        ("crashed", None): poison[Kind.KILLS],
    }
    # A try that ended with its process, killed by another message, is counted and made again.
    assert {attempts for _, _, attempts in letters} <= {3, 4, 5}
