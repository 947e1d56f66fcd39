"""`python -m benchmarks.shapes`: steps in a row, side by side, and for each of many items; a store full of ended sagas.

All runs are on the same servers, one after the other, so their numbers compare. The store is filled with copies of a
saga that has really ended, with its history and what its handlers have recorded of it.
"""

import argparse
import asyncio
import time
from collections.abc import Callable
from uuid import UUID

from rich.console import Console
from rich.table import Table
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.app import BasketPlaced, BulkPlaced, OrderPlaced
from benchmarks.runs import pass_through, processes, settings
from coordinator.node import open_bus, open_schema
from coordinator.store import Store
from events.bus import Bus
from events.clock import SystemClock
from events.database import transaction
from events.message import Event
from tests.support import servers

_BATCH = 50_000
# Copies are older than all others: ids are ordered by time.
_COPY = (
    """CREATE TEMPORARY TABLE copy ON COMMIT DROP AS
       SELECT n, (lpad(to_hex(n), 12, '0') || substr(md5(n::text), 1, 20))::uuid AS id
       FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n""",
    """CREATE TEMPORARY TABLE model ON COMMIT DROP AS
       SELECT * FROM saga_instance WHERE saga = 'three_steps' AND status = 'completed' ORDER BY id DESC LIMIT 1""",
    """INSERT INTO saga_instance
       SELECT (jsonb_populate_record(model, jsonb_build_object('id', copy.id, 'key', copy.id::text))).*
       FROM copy, model""",
    """INSERT INTO saga_history SELECT (jsonb_populate_record(h, jsonb_build_object('saga_id', copy.id))).*
       FROM copy, model JOIN saga_history h ON h.saga_id = model.id""",
    """INSERT INTO inbox (message_key, consumer, reply, reply_to, content, handled_at)
       SELECT (lpad(to_hex(n), 12, '0') || substr(md5(step || n::text), 1, 20))::uuid,
              'saga', i.reply, i.reply_to, i.content, i.handled_at
       FROM copy, (VALUES ('a'), ('b'), ('c')) AS steps (step), (SELECT * FROM inbox LIMIT 1) i""",
)
Row = tuple[str, int, int, float]  # what ran, how many sagas and commands, and the seconds that it took


async def fill(engine: AsyncEngine, sagas: int) -> None:
    """Put copies of an ended saga into the store."""
    for first in range(1, sagas + 1, _BATCH):
        async with transaction(engine) as connection:
            limits = {"first": first, "last": min(sagas, first + _BATCH - 1)}
            for number, statement in enumerate(_COPY):
                await connection.execute(text(statement), {} if number else limits)
    async with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        await connection.execute(text("VACUUM ANALYZE saga_instance, saga_history, inbox"))


async def measure(amqp_url: str, pg_url: str, sagas: int, items: int, finished: int) -> list[Row]:
    chosen = settings(amqp_url, pg_url)
    rows: list[Row] = []
    with processes(chosen, ("coordinator", "handlers")):
        async with open_schema(chosen) as engine, open_bus(chosen, engine, application="benchmark") as (bus, _):
            store = Store(engine, SystemClock())

            async def run(name: str, number: int, commands: int, kind: Callable[[UUID], Event]) -> None:
                seconds = await _timed(bus, store, number, kind)
                rows.append((name, number, commands, seconds))

            await pass_through(bus, store, sagas // 10)
            for _ in range(2):
                await run("three steps in a row", sagas, 3 * sagas, _order)
                await run("three steps side by side", sagas, 3 * sagas, _basket)
                await run("one step for each item", 1, items, lambda order: BulkPlaced(order_id=order, parcels=items))
            if finished:
                await fill(engine, finished)
                for _ in range(2):
                    name = f"three steps in a row, {finished:,} ended sagas in the store"
                    await run(name, sagas, 3 * sagas, _order)
    return rows


def _order(order: UUID) -> Event:
    return OrderPlaced(order_id=order, amount=1)


def _basket(order: UUID) -> Event:
    return BasketPlaced(order_id=order)


async def _timed(bus: Bus, store: Store, sagas: int, kind: Callable[[UUID], Event]) -> float:
    start = time.perf_counter()
    await pass_through(bus, store, sagas, kind)
    return time.perf_counter() - start


def main() -> None:
    """Measure; servers come from TEST_AMQP_URL and TEST_PG_URL, Docker, or this machine's programs."""
    parser = argparse.ArgumentParser(prog="benchmarks.shapes", description=main.__doc__)
    parser.add_argument("--sagas", type=int, default=3000, help="sagas of a run (default 3000)")
    parser.add_argument("--items", type=int, default=10_000, help="items of the fan-out (default 10,000)")
    parser.add_argument("--finished", type=int, default=0, help="ended sagas to fill the store with (default none)")
    options = parser.parse_args()
    table = Table("RabbitMQ + PostgreSQL", "sagas", "commands", "seconds", "commands/s")
    with servers.provided() as given:
        rows = asyncio.run(measure(given.amqp_url, given.pg_url, options.sagas, options.items, options.finished))
    for name, sagas, commands, seconds in rows:
        table.add_row(name, f"{sagas:,}", f"{commands:,}", f"{seconds:.1f}", f"{commands / seconds:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
