"""Processes a file of events on the embedded bus, with stand-ins for all third parties."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import insert, select

from coordinator.catalog import make_app
from coordinator.demo.generate import EVENTS, STOCK
from coordinator.demo.services import running_services
from coordinator.instance import Status
from coordinator.node import Node
from coordinator.publishing import publish_lines
from coordinator.settings import Settings
from coordinator.views import print_counts
from events.clock import Clock, SystemClock
from events.database import transaction
from events.errors import ConfigurationError
from handlers.catalog.tables import stock_item

_LOOK_EVERY = 0.1
Counts = Mapping[tuple[str, Status], int]


async def run_demo(
    *, directory: Path, events: Path | None, console: Console, as_json: bool, clock: Clock | None = None
) -> int:
    """Run the demonstration in `directory` and return the exit code: 0 if every saga was completed or compensated.

    It can be killed at any time and started again: it goes on where it was.
    """
    clock = clock or SystemClock()
    file = events or EVENTS
    expected = _prepare(directory, file)
    database = directory / "coordinator.db"
    settings = Settings(broker_url="embedded:", database_url=f"sqlite:///{database}")
    async with running_services(directory / "journal.jsonl") as (third_parties, journal):
        app = make_app(third_parties)
        async with Node(app, settings) as node:
            await _fill_stock(node)
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[state]}"),
                console=console,
                disable=as_json or not console.is_terminal,
            ) as progress:
                with file.open("rb") as lines:
                    quiet = Console(file=sys.stderr, quiet=True)
                    good = await publish_lines(lines, node.bus, app, settings.limits, quiet, as_json=False)
                counts = await _watch(node, progress, expected, clock)
        done = journal.counts()
    _report(console, counts, done, database, as_json=as_json)
    ended_well = all(status in (Status.COMPLETED, Status.COMPENSATED) for _, status in counts)
    return 0 if good and ended_well and sum(counts.values()) >= expected else 1


def _prepare(directory: Path, events: Path) -> int:
    """Make the folder and return how many events there are."""
    if not events.is_file():
        raise ConfigurationError(f"there is no file {events}")
    directory.mkdir(parents=True, exist_ok=True)
    return sum(1 for line in events.read_bytes().splitlines() if line.strip())


async def _fill_stock(node: Node) -> None:
    async with transaction(node.engine) as connection:
        known = set((await connection.execute(select(stock_item.c.sku))).scalars())
        missing = [{"sku": sku, "available": number} for sku, number in STOCK.items() if sku not in known]
        if missing:
            await connection.execute(insert(stock_item), missing)


async def _watch(node: Node, progress: Progress, expected: int, clock: Clock) -> Counts:
    """Show how far the sagas are until all have ended."""
    task = progress.add_task("sagas", total=expected, state="")
    while True:
        counts = await node.store.count_by_status()
        ended = sum(number for (_, status), number in counts.items() if not status.in_flight)
        totals: dict[str, int] = {}
        for (_, status), number in counts.items():
            totals[status.value] = totals.get(status.value, 0) + number
        state = ", ".join(f"{number} {name}" for name, number in sorted(totals.items()))
        progress.update(task, completed=ended, state=state)
        if ended >= expected and ended == sum(counts.values()):
            return counts
        await clock.sleep(_LOOK_EVERY)


def _report(console: Console, counts: Counts, done: Mapping[str, int], database: Path, *, as_json: bool) -> None:
    if as_json:
        sagas = [{"saga": s, "status": status.value, "count": counts[s, status]} for s, status in sorted(counts)]
        console.file.write(json.dumps({"sagas": sagas, "third_parties": dict(done)}) + "\n")
        return
    print_counts(console, counts)
    table = Table("what third parties did", "times")
    for what, number in done.items():
        table.add_row(what, str(number))
    console.print(table)
    console.print(
        f"\nLook closer:\n  export COORDINATOR_DATABASE_URL=sqlite:///{database}\n"
        "  coordinator sagas list --status compensated\n"
        "  coordinator sagas show ID\n"
        "  coordinator sagas chart coordinator.catalog:app --of ID\n"
        "Kill it in the middle (kill -9) and start it again: it goes on where it was.",
        highlight=False,
        markup=False,
    )
