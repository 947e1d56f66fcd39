"""The runs: many sagas at once, and one at a time, on the embedded bus and on RabbitMQ with PostgreSQL."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from uuid import UUID

import psutil

from benchmarks import floor
from benchmarks.app import OrderCompleted, OrderPlaced, app
from benchmarks.report import Latency, Milliseconds, Throughput, loop_ns
from coordinator.node import Node, open_bus, open_schema
from coordinator.settings import Settings
from coordinator.store import Store
from events.bus import Address, Bus, Delivery, Exchange, Outgoing, Queue
from events.clock import SystemClock
from events.codec import Limits
from events.envelope import wrap
from events.ids import TimeOrderedIds
from events.message import Event
from events.outbox import Outbound, route
from events.publisher import Publisher
from events.relay import Entry, bundled

DELIVERIES = 8  # start, three commands, three replies, and the event that tells this benchmark
COMMITS = 7  # four of the coordinator, three of the handlers

_COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'coordinator'; from coordinator.cli import main; main()"]
_clock = SystemClock()
_ids = TimeOrderedIds()


def settings(broker_url: str, database_url: str) -> Settings:
    return Settings(broker_url=broker_url, database_url=database_url, log_level="WARNING")


async def throughput_embedded(folder: Path, sagas: int) -> Throughput:
    """One process does everything, in one SQLite file."""
    async with Node(app, settings("embedded:", f"sqlite:///{folder / 'throughput.db'}")) as node:
        await pass_through(node.bus, node.store, sagas // 10)
        cpu, start = time.process_time(), time.perf_counter()
        await pass_through(node.bus, node.store, sagas)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Throughput("embedded, SQLite, one process", sagas, sagas / seconds, {"all": cpu / sagas * 1000}, loop_ns())


async def throughput_servers(amqp_url: str, pg_url: str, sagas: int) -> Throughput:
    """A coordinator process and a handler process, as an operator starts them."""
    chosen = settings(amqp_url, pg_url)
    with processes(chosen, ("coordinator", "handlers")) as started:
        async with open_schema(chosen) as engine, open_bus(chosen, engine, application="benchmark") as (bus, _):
            store = Store(engine, _clock)
            await pass_through(bus, store, sagas // 10)
            before = [_cpu(process) for process in started.values()]
            start = time.perf_counter()
            await pass_through(bus, store, sagas)
            seconds = time.perf_counter() - start
            used = [_cpu(process) - cpu for process, cpu in zip(started.values(), before, strict=True)]
    cpu = {name: value / sagas * 1000 for name, value in zip(started, used, strict=True)}
    return Throughput("RabbitMQ quorum queues + PostgreSQL, two processes", sagas, sagas / seconds, cpu, loop_ns())


async def latency_embedded(folder: Path, sagas: int) -> Latency:
    commit = floor.commit_sqlite(folder, sagas)
    async with Node(app, settings("embedded:", f"sqlite:///{folder / 'latency.db'}")) as node:
        times = await _one_by_one(node.bus, sagas)
    return _latency("embedded, SQLite, one process", times, None, commit)


async def latency_servers(amqp_url: str, pg_url: str, sagas: int) -> Latency:
    chosen = settings(amqp_url, pg_url)
    with processes(chosen, ("coordinator", "handlers")):
        async with open_schema(chosen) as engine, open_bus(chosen, engine, application="benchmark") as (bus, _):
            delivery = await floor.delivery(amqp_url, sagas)
            commit = await floor.commit_postgres(pg_url, sagas)
            times = await _one_by_one(bus, sagas)
    return _latency("RabbitMQ quorum queues + PostgreSQL, two processes", times, delivery, commit)


def _latency(setup: str, times: Sequence[float], delivery: Milliseconds | None, commit: Milliseconds) -> Latency:
    least = COMMITS * commit.p50 + (DELIVERIES * delivery.p50 if delivery else 0)
    saga = Milliseconds.of(times)
    return Latency(setup, len(times), saga, delivery, commit, round(least, 2), round(saga.p50 / least, 2), loop_ns())


async def pass_through(bus: Bus, store: Store, sagas: int, kind: Callable[[UUID], Event] | None = None) -> None:
    """Publish start events in bundles, as a relay would, and wait until their sagas have ended."""
    before = sum((await store.count_by_status()).values())
    errors = await bus.publish(_starts(sagas, kind or (lambda order: OrderPlaced(order_id=order, amount=1))))
    if failed := [error for error in errors if error]:
        raise failed[0]
    # To count all is to read all, which would be measured, too: only when nothing is in flight any more.
    while await store.count_in_flight() or not await _all_have_ended(store, before + sagas):
        await _clock.sleep(0.1)


async def _all_have_ended(store: Store, sagas: int) -> bool:
    counts = await store.count_by_status()
    return sum(counts.values()) >= sagas and not any(status.in_flight for _, status in counts)


def _starts(sagas: int, kind: Callable[[UUID], Event]) -> list[Outgoing]:
    entries = []
    for _ in range(sagas):
        event = kind(_ids.new())
        envelope = wrap(event, id=str(_ids.new()), source="/benchmark", time=_clock.now())
        outbound = Outbound(envelope, route(event))
        entries.append(Entry(_ids.new(), outbound.address, 64, outbound.encode(Limits()), None, None))
    return [bundle.outgoing() for bundle in bundled(entries, Limits(), share=2)]


async def _one_by_one(bus: Bus, sagas: int) -> list[float]:
    publisher = Publisher(bus, "/benchmark", clock=_clock, ids=_ids, limits=Limits())
    times = []
    async with _told(bus) as told:
        for number in range(sagas + sagas // 10):
            start = time.perf_counter()
            await publisher.publish(OrderPlaced(order_id=_ids.new(), amount=0))
            await told.get()
            if number >= sagas // 10:  # the first ones warm up
                times.append(time.perf_counter() - start)
            await _clock.sleep(0.005)  # alone means that nothing is left over from the one before
    return times


@asynccontextmanager
async def _told(bus: Bus) -> AsyncIterator[asyncio.Queue[None]]:
    """A queue that gets something whenever a saga has announced its end."""
    told: asyncio.Queue[None] = asyncio.Queue()
    acknowledging: set[asyncio.Task[None]] = set()

    def deliver(delivery: Delivery) -> None:
        told.put_nowait(None)
        task = asyncio.get_running_loop().create_task(delivery.ack())
        acknowledging.add(task)
        task.add_done_callback(acknowledging.discard)

    queue = Queue("benchmark.told", (Address(Exchange.EVENTS, OrderCompleted.message_type),))
    await bus.declare([queue])
    consumer = await bus.consume(queue.name, deliver, prefetch=10)
    try:
        yield told
    finally:
        await consumer.cancel()


@contextmanager
def processes(chosen: Settings, parts: Sequence[str]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    environment = {
        **os.environ,
        "COORDINATOR_BROKER_URL": chosen.broker_url.get_secret_value(),
        "COORDINATOR_DATABASE_URL": chosen.database_url.get_secret_value(),
        "COORDINATOR_LOG_LEVEL": "WARNING",
    }
    started: dict[str, subprocess.Popen[str]] = {}
    with ExitStack() as stack:
        for part in parts:
            command = [*_COMMAND, "run", "benchmarks.app:app", "--only", part]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.terminate)
            started[part] = process
        for part, process in started.items():
            if not process.stdout or "running" not in process.stdout.readline():
                raise RuntimeError(f"the {part} process did not start")
        yield started


def _cpu(process: subprocess.Popen[str]) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return float(times.user + times.system)
