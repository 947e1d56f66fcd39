"""The bare cost of what a saga cannot do without: deliveries and commits, one after the other."""

import asyncio
import sqlite3
import time
from pathlib import Path
from uuid import uuid4

import aio_pika
import asyncpg

from benchmarks.report import Milliseconds


async def delivery(amqp_url: str, rounds: int) -> Milliseconds:
    """Publish to a quorum queue, confirmed, and receive on another connection; then the next."""
    async with await aio_pika.connect(amqp_url) as sender, await aio_pika.connect(amqp_url) as receiver:
        publishing = await sender.channel(publisher_confirms=True)
        consuming = await receiver.channel()
        await consuming.set_qos(prefetch_count=1)
        queue = await consuming.declare_queue(f"floor-{uuid4()}", durable=True, arguments={"x-queue-type": "quorum"})
        arrived = asyncio.Event()

        async def arrive(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            arrived.set()
            await message.ack()

        await queue.consume(arrive)
        times = []
        for _ in range(rounds):
            arrived.clear()
            start = time.perf_counter()
            message = aio_pika.Message(b"x" * 600, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
            await publishing.default_exchange.publish(message, queue.name)
            await arrived.wait()
            times.append(time.perf_counter() - start)
        await queue.delete(if_unused=False, if_empty=False)
    return Milliseconds.of(times)


async def commit_postgres(pg_url: str, rounds: int) -> Milliseconds:
    """Insert one row of a message's size and commit."""
    connection = await asyncpg.connect(pg_url.replace("postgresql+asyncpg", "postgresql"))
    try:
        await connection.execute("CREATE TABLE floor (id bigserial PRIMARY KEY, body bytea)")
        insert = await connection.prepare("INSERT INTO floor (body) VALUES ($1)")
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            async with connection.transaction():
                await insert.fetch(b"x" * 600)
            times.append(time.perf_counter() - start)
        await connection.execute("DROP TABLE floor")
    finally:
        await connection.close()
    return Milliseconds.of(times)


def commit_sqlite(folder: Path, rounds: int) -> Milliseconds:
    """Insert one row of a message's size and commit, with a write-ahead log that is synced."""
    connection = sqlite3.connect(folder / "floor.db", isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE floor (id INTEGER PRIMARY KEY, body BLOB)")
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO floor (body) VALUES (?)", (b"x" * 600,))
            connection.execute("COMMIT")
            times.append(time.perf_counter() - start)
    finally:
        connection.close()
    return Milliseconds.of(times)
