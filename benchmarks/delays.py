"""`python -m benchmarks.delays`: what it costs to let messages wait: as rows, or in levels of queues.

The levels are the usual way on RabbitMQ without a plugin: a queue with a time to live for each power of two, each
dead-lettering into the next; a delay whose bits are set three times passes three of them.
"""

import asyncio
import time
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import aio_pika
import psutil
from rich.console import Console
from rich.table import Column, Table

from events.clock import SystemClock
from events.database import open_database, transaction
from events.ids import TimeOrderedIds
from events.tables import metadata
from handlers.retries import Retries, Waiting
from tests.support import local

MESSAGES = 5000
BODY = b"x" * 400
LEVELS = 3
_clock = SystemClock()


async def rows(url: str) -> None:
    """Let messages wait as rows; take, and remove them."""
    engine, ids = open_database(url), TimeOrderedIds()
    async with transaction(engine) as connection:
        await connection.run_sync(metadata.create_all)
    retries = Retries(engine, clock=_clock, ids=ids)
    await retries.clock.calibrate()
    for _ in range(MESSAGES // 250):
        now = retries.clock.now()
        waiting = [_waiting(ids.new(), ids.new(), now) for _ in range(250)]
        async with transaction(engine) as connection:
            await retries.add(connection, waiting)
    taken = 0
    while taken < MESSAGES:
        found = await retries.claim("handler", 32)
        if not found:
            await _clock.sleep(0.1)
            continue
        async with transaction(engine) as connection:
            await retries.remove(connection, found)
        taken += len(found)
    await engine.dispose()


def _waiting(row: UUID, key: UUID, now: datetime) -> Waiting:
    return Waiting(
        row, "handler", key, BODY, None, None, {}, "id", "type", None, None, now, now + timedelta(seconds=3), attempts=3
    )


async def levels(url: str) -> None:
    """Let messages pass levels of queues; take, and acknowledge them."""
    connection = await aio_pika.connect(url)
    channel = await connection.channel()
    end = await channel.declare_exchange("end", "fanout", durable=True)
    queue = await channel.declare_queue("end", durable=True, arguments={"x-queue-type": "quorum"})
    await queue.bind(end)
    first = end
    for level in reversed(range(LEVELS)):
        arguments: dict[str, Any] = {
            "x-queue-type": "quorum",
            "x-message-ttl": 1000,
            "x-dead-letter-exchange": first.name,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
        first = await channel.declare_exchange(f"level{level}", "fanout", durable=True)
        await (await channel.declare_queue(f"level{level}", durable=True, arguments=arguments)).bind(first)
    for _ in range(MESSAGES // 500):
        message = aio_pika.Message(BODY, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await asyncio.gather(*(first.publish(message, "") for _ in range(500)))
    taken = 0
    async with queue.iterator() as messages:
        async for delivery in messages:
            await delivery.ack()
            taken += 1
            if taken == MESSAGES:
                break
    await connection.close()


def cpu(process: psutil.Process) -> float:
    """Return the CPU seconds that a server and its children have used, those that have ended included."""
    times = process.cpu_times()
    used: float = times.user + times.system + times.children_user + times.children_system
    for each in process.children(recursive=True):
        used += each.cpu_times().user + each.cpu_times().system
    return used


def server_of(url: str) -> psutil.Process:
    """Return the process that listens at `url`."""
    port = urlsplit(url).port
    listening = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.laddr]
    return psutil.Process(next(each.pid for each in listening if each.laddr and each.laddr.port == port))


def main() -> None:
    """Measure on servers of its own."""
    table = Table("messages wait as", *(Column(name, justify="right") for name in ("server CPU s", "our CPU s")))
    broker, database = local.LocalRabbitMQ(), local.LocalPostgres()
    try:
        broker.start()
        database.start()
        with database.database() as pg_url, broker.vhost() as amqp_url:
            for name, server, work in (
                ("rows of a table", server_of(pg_url), rows(pg_url)),
                (f"{LEVELS} levels of queues", server_of(amqp_url), levels(amqp_url)),
            ):
                before, ours = cpu(server), time.process_time()
                asyncio.run(work)
                table.add_row(name, f"{cpu(server) - before:.2f}", f"{time.process_time() - ours:.2f}")
    finally:
        broker.close()
        database.close()
    Console().print(table)


if __name__ == "__main__":
    main()
