"""`coordinator dead-letters`: what was given up on is looked at, replayed, edited, discarded."""

import getpass
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer
from rich.console import Console

from coordinator import dead_letter_views as views
from coordinator import process
from coordinator.node import open_reading, open_schema
from coordinator.settings import load_settings
from events.clock import SystemClock
from events.errors import ConfigurationError
from events.ids import TimeOrderedIds
from handlers.replay import DeadLetters, Query

dead_letters = typer.Typer(help="Look at what was given up on, and replay it.", no_args_is_help=True)

out = Console()

Ids = Annotated[list[UUID] | None, typer.Argument(metavar="[ID]...", help="the ids of letters")]
Id = Annotated[UUID, typer.Argument(metavar="ID", help="the id of a letter")]
OfHandler = Annotated[str | None, typer.Option("--handler", help="given up on by this handler")]
OfReason = Annotated[str | None, typer.Option("--reason", help="for this reason")]
OfGroup = Annotated[str | None, typer.Option("--fingerprint", help="for this cause, as `list --groups` names it")]
OfType = Annotated[str | None, typer.Option("--type", help="messages of this type")]
OfSaga = Annotated[UUID | None, typer.Option("--saga", help="messages of this saga")]
All = Annotated[bool, typer.Option("--all", help="all letters that are dead")]
By = Annotated[str | None, typer.Option(help="who does it; by default the user's login")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]


@dead_letters.command("list")
def list_letters(
    handler: OfHandler = None,
    reason: OfReason = None,
    fingerprint: OfGroup = None,
    message_type: OfType = None,
    saga: OfSaga = None,
    status: Annotated[str, typer.Option(help="dead, replayed, discarded or any")] = "dead",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="how many, newest first")] = 50,
    groups: Annotated[bool, typer.Option("--groups", help="by cause instead")] = False,
    as_json: AsJson = False,
) -> None:
    """List letters, newest first, or their groups."""
    if status not in ("dead", "replayed", "discarded", "any"):
        raise ConfigurationError(f"--status takes dead, replayed, discarded or any, not {status!r}")
    query = Query(None, handler, reason, fingerprint, message_type, saga, None if status == "any" else status)

    async def work(letters: DeadLetters) -> None:
        if groups:
            views.print_groups(out, await letters.groups(query), as_json=as_json)
        else:
            views.print_letters(out, await letters.find(query, limit=limit), as_json=as_json)

    _with_letters(work)


@dead_letters.command("show")
def show_letter(letter: Id, as_json: AsJson = False) -> None:
    """Show all of a letter: body, headers, the error's stack, and what was done with it."""

    async def work(letters: DeadLetters) -> None:
        views.print_letter(out, await letters.get(letter), as_json=as_json)

    _with_letters(work)


@dead_letters.command("replay")
def replay_letters(
    ids: Ids = None,
    handler: OfHandler = None,
    reason: OfReason = None,
    fingerprint: OfGroup = None,
    message_type: OfType = None,
    saga: OfSaga = None,
    everything: All = False,
    rate: Annotated[float | None, typer.Option(min=0.001, help="letters a second; by default all at once")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would happen, and do nothing")] = False,
    why: Annotated[str, typer.Option(help="why, for the record")] = "",
    by: By = None,
    as_json: AsJson = False,
) -> None:
    """Give letters to the handler that failed, once more. Those of one saga go in their order."""
    query = _narrow(ids, handler, reason, fingerprint, message_type, saga, everything=everything)

    async def work(letters: DeadLetters) -> None:
        if dry_run:
            done = [planned async for planned in letters.plan(query, rate=rate)]
        else:
            done = [planned async for planned in letters.replay(query, rate=rate, by=by or getpass.getuser(), why=why)]
        views.print_plan(out, done, dry_run=dry_run, as_json=as_json)

    _with_letters(work, writing=not dry_run)


@dead_letters.command("edit")
def edit_letter(
    letter: Id,
    data: Annotated[Path, typer.Option(help="a file with the new `data`, a JSON object; - for standard input")],
    why: Annotated[str, typer.Option(help="why, for the record")] = "",
    by: By = None,
) -> None:
    """Give a letter other data. It is then replayed with these; the original is kept."""
    if str(data) != "-" and not data.is_file():
        raise ConfigurationError(f"there is no file {data}")
    given = sys.stdin.buffer.read() if str(data) == "-" else data.read_bytes()

    async def work(letters: DeadLetters) -> None:
        views.print_letter(out, await letters.edit(letter, given, by=by or getpass.getuser(), why=why), as_json=False)

    _with_letters(work, writing=True)


@dead_letters.command("discard")
def discard_letters(
    why: Annotated[str, typer.Option(help="why, for the record")],
    ids: Ids = None,
    handler: OfHandler = None,
    reason: OfReason = None,
    fingerprint: OfGroup = None,
    message_type: OfType = None,
    saga: OfSaga = None,
    everything: All = False,
    by: By = None,
) -> None:
    """Settle letters without a replay. They stay in the table."""
    query = _narrow(ids, handler, reason, fingerprint, message_type, saga, everything=everything)

    async def work(letters: DeadLetters) -> None:
        count = await letters.discard(query, by=by or getpass.getuser(), why=why)
        out.print(f"{count} discarded", highlight=False)

    _with_letters(work, writing=True)


def _narrow(
    ids: list[UUID] | None,
    handler: str | None,
    reason: str | None,
    fingerprint: str | None,
    message_type: str | None,
    saga: UUID | None,
    *,
    everything: bool,
) -> Query:
    query = Query(ids or None, handler, reason, fingerprint, message_type, saga)
    if query.is_narrow == everything:
        raise ConfigurationError("name letters by their ids or by --handler, --reason and so on, or say --all")
    return query


def _with_letters(work: Callable[[DeadLetters], Awaitable[None]], *, writing: bool = False) -> None:
    """Let `work` look at the letters, or write: then an SQLite file must not be in use by another process."""
    settings = load_settings()
    process.log_to_stderr("WARNING", settings.log_format)

    async def working() -> None:
        opened = open_schema if writing else open_reading
        async with opened(settings) as engine:
            await work(DeadLetters(engine, clock=SystemClock(), ids=TimeOrderedIds(), limits=settings.limits))

    process.run(working())
