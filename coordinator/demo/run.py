"""Processes a file of events on the embedded bus, with stand-ins for all third parties."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import SecretStr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from sqlalchemy import insert, select

from coordinator.app import App
from coordinator.catalog import make_app
from coordinator.demo.journal import Journal
from coordinator.demo.services import running_services
from coordinator.instance import Status
from coordinator.node import Node
from coordinator.publishing import publish_lines
from coordinator.settings import EMBEDDED, Settings
from coordinator.tables import saga_instance
from coordinator.views import COLOURS, print_counts
from events.clock import Clock, SystemClock
from events.codec import STRUCTURED_TYPE, Limits, Readable, read_body
from events.database import reader, transaction
from events.errors import ConfigurationError, RejectedError
from handlers import Retry
from handlers.catalog.tables import stock_item

EVENTS = Path(__file__).parent / "events.jsonl"
STOCK = {"lamp": 500, "chair": 500, "table": 500, "unicorn": 0}

_LOOK_EVERY = 0.1
_HASTY = Retry(attempts=5, first=0.5, factor=2, most=2)  # nobody wants to watch for minutes how a card is given up on
Counts = Mapping[tuple[str, Status], int]
Keys = set[tuple[str, str]]


async def run_demo(
    *, directory: Path, events: Path | None, console: Console, as_json: bool, clock: Clock | None = None
) -> int:
    """Run the demonstration in `directory` and return the exit code.

    It can be killed at any time and started again on the same directory: it goes on where it was.

    Args:
        directory: where its database and the journal of the third parties are; made if missing.
        events: CloudEvents, one JSON object a line; by default the ones it brings.
        console: where progress and results go.
        as_json: print the result as one JSON object, and nothing else.
        clock: paces the looks at the store.

    Returns:
        0 if all events were published and every saga was completed or compensated, 1 otherwise.

    Raises:
        ConfigurationError: there is no such file, or a demonstration is running in this directory.
    """
    file = events or EVENTS
    _prepare(directory, file)
    database = directory / "coordinator.db"
    settings = Settings(broker_url=SecretStr(EMBEDDED), database_url=SecretStr(f"sqlite:///{database}"), migrate=True)
    async with running_services(directory / "journal.jsonl") as (third_parties, journal):
        app = make_app(third_parties)
        app = replace(app, handlers=[replace(handler, retry=_HASTY) for handler in app.handlers])
        async with Node(app, settings) as node:
            await _fill_stock(node)
            expected = len(_sagas_of(file, app, settings.limits) | await _sagas_in(node))
            board = _Board(console, expected, disable=as_json or not console.is_terminal)
            with board.progress, file.open("rb") as lines:
                good = await publish_lines(lines, node.bus, app, settings.limits, Console(quiet=True), as_json=False)
                counts = await _watch(node, board, expected, clock or SystemClock())
        _report(console, counts, journal, database, as_json=as_json)
    ended_well = all(status in (Status.COMPLETED, Status.COMPENSATED) for _, status in counts)
    return 0 if good and ended_well else 1


def _prepare(directory: Path, events: Path) -> None:
    if not events.is_file():
        raise ConfigurationError(f"there is no file {events}")
    directory.mkdir(parents=True, exist_ok=True)


def _sagas_of(file: Path, app: App, limits: Limits) -> Keys:
    """Return name and business key of each saga that the events of a file start."""
    registry = app.registry
    keys: Keys = set()
    with file.open("rb") as lines:
        for line in lines:
            for part in read_body(line, content_type=STRUCTURED_TYPE, headers={}, encoding=None, limits=limits):
                if not isinstance(part, Readable):
                    continue  # publishing it says why it starts nothing
                try:
                    message = registry.read(part.envelope)
                except RejectedError:
                    continue
                for definition in (saga.definition for saga in app.sagas):
                    for start in definition.starts:
                        if isinstance(message, start.event):
                            saga = getattr(definition.cls, start.name)(message)
                            keys.add((definition.name, definition.key_of(start, saga)))
    return keys


async def _sagas_in(node: Node) -> Keys:
    async with reader(node.engine).connect() as connection:
        rows = await connection.execute(select(saga_instance.c.saga, saga_instance.c.key))
        return {(row.saga, row.key) for row in rows}


async def _fill_stock(node: Node) -> None:
    async with transaction(node.engine) as connection:
        known = set((await connection.execute(select(stock_item.c.sku))).scalars())
        missing = [{"sku": sku, "available": number} for sku, number in STOCK.items() if sku not in known]
        if missing:
            await connection.execute(insert(stock_item), missing)


class _Board:
    """How many sagas stand where, drawn anew while `progress` is entered."""

    def __init__(self, console: Console, expected: int, *, disable: bool) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            disable=disable,
            transient=True,
        )
        self._ended = self.progress.add_task("[bold]sagas ended[/]", total=expected)
        self._rows = {
            status: self.progress.add_task(f"  [{COLOURS[status]}]{status.value}[/]", total=expected)
            for status in Status
        }
        self.update({})

    def update(self, counts: Counts) -> None:
        self.progress.update(self._ended, completed=_ended(counts))
        for status, row in self._rows.items():
            number = sum(each for (_, at), each in counts.items() if at is status)
            visible = number > 0 or status not in (Status.NEEDS_ATTENTION, Status.ARCHIVED)
            self.progress.update(row, completed=number, visible=visible)


async def _watch(node: Node, board: _Board, expected: int, clock: Clock) -> Counts:
    """Show how far the sagas are until all have ended."""
    while True:
        counts = await node.store.count_by_status()
        board.update(counts)
        if _ended(counts) >= expected:
            return counts
        await clock.sleep(_LOOK_EVERY)


def _ended(counts: Counts) -> int:
    return sum(number for (_, status), number in counts.items() if not status.in_flight)


def _report(console: Console, counts: Counts, journal: Journal, database: Path, *, as_json: bool) -> None:
    done = journal.counts()
    if as_json:
        sagas = [{"saga": s, "status": status.value, "count": counts[s, status]} for s, status in sorted(counts)]
        console.file.write(json.dumps({"sagas": sagas, "third_parties": done, "repeats": journal.repeats}) + "\n")
        return
    print_counts(console, counts)
    table = Table("what third parties did", Column("times", justify="right"))
    for what, number in done.items():
        table.add_row(what, str(number))
    table.add_section()
    table.add_row("asked again, not done again", str(journal.repeats))
    console.print(table)
    status = Status.NEEDS_ATTENTION if any(at is Status.NEEDS_ATTENTION for _, at in counts) else Status.COMPENSATED
    url = shlex.quote(f"sqlite:///{database}")
    console.print(
        "\nLook closer (a saga's key is the id of its user or order):\n"
        f"  export COORDINATOR_DATABASE_URL={url}\n"
        f"  coordinator sagas list --status {status.value}\n"
        "  coordinator sagas show KEY\n"
        "  coordinator sagas chart coordinator.catalog:app --of KEY\n"
        "Kill it in the middle (kill -9) and start it again: it goes on where it was.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
