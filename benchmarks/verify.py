"""`python -m benchmarks.verify [--sagas N] [--only postgresql|sqlite]`: how long `coordinator verify` takes.

Of a hundred sagas 95 are completed, 4 compensated, and 1 is under way.
"""

import argparse
import tempfile
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console

from benchmarks.app import OrderPlaced, ThreeSteps
from coordinator import process, schema
from coordinator.decision import Decision
from coordinator.store import Store
from coordinator.testing import SagaRun
from coordinator.verification import Verification
from events.clock import SystemClock
from events.database import open_database, transaction
from events.ids import TimeOrderedIds
from tests.support import servers
from tests.support.histories import chained

_MANY = 2000
_clock = SystemClock()
_ids = TimeOrderedIds()


def kinds() -> list[list[Decision]]:
    """The decisions of a hundred sagas."""
    started = OrderPlaced(order_id=_ids.new(), amount=1)
    completed, compensated, running = (SagaRun(ThreeSteps, started) for _ in range(3))
    for run in (completed, compensated, running):
        run.now = datetime.now(UTC) + timedelta(days=1)  # its deadlines are to come however long this takes
        run.succeeds()
    completed.succeeds().succeeds()
    compensated.declines("no money").succeeds()
    return [*[completed.decisions] * 95, *[compensated.decisions] * 4, running.decisions]


async def measure(url: str, sagas: int, console: Console) -> None:
    engine = open_database(url)
    await schema.upgrade(engine)
    store = Store(engine, _clock)
    patterns = kinds()
    for first in range(0, sagas, _MANY):
        numbers = range(first, min(sagas, first + _MANY))
        many = [chained(patterns[number % 100], _ids.new(), f"{number}") for number in numbers]
        async with transaction(engine) as connection:
            await store.insert(connection, [instance for instance, _ in many])
            await store.record(connection, [row for _, rows in many for row in rows])
    async with transaction(engine) as connection:
        await connection.exec_driver_sql("ANALYZE")
    await engine.dispose()
    reading = open_database(url, read_only=True)
    verification = Verification(reading, _clock)
    start = time.perf_counter()
    findings = [each async for each in verification.findings()]
    seconds = time.perf_counter() - start
    await reading.dispose()
    checked = verification.checked
    console.print(
        f"{reading.dialect.name}: {checked.sagas} sagas, {checked.transitions} transitions, {checked.retold} retold:"
        f" {seconds:.1f} s, {len(findings)} findings",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.verify", description=__doc__)
    parser.add_argument("--sagas", type=int, default=1_000_000)
    parser.add_argument("--only", choices=["postgresql", "sqlite"])
    options = parser.parse_args()
    console = Console()
    if options.only != "sqlite":
        with closing(servers.postgres(durable=False)) as server:
            server.start()
            with server.database() as url:
                process.run(measure(url, options.sagas, console))
    if options.only != "postgresql":
        with tempfile.TemporaryDirectory() as folder:
            process.run(measure(f"sqlite:///{Path(folder) / 'verify.db'}", options.sagas, console))


main()
