"""`coordinator dead-letters`: what was given up on is looked at, replayed, edited, discarded, deleted."""

import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated
from uuid import UUID

import typer
from rich.console import Console

from coordinator import dead_letter_views as views
from coordinator import process
from coordinator.app import App
from coordinator.durations import utc_if_any
from coordinator.loading import load_app
from coordinator.node import open_reading, open_schema
from coordinator.settings import load_settings
from events.clock import SystemClock
from events.dead_letters import BUS, COORDINATOR, DEAD
from events.errors import ConfigurationError
from events.ids import TimeOrderedIds
from events.registry import Registry
from handlers.letter_edits import Consumers
from handlers.letters import Letter, Query
from handlers.replay import DeadLetters

dead_letters = typer.Typer(help="Look at what was given up on, and replay it.", no_args_is_help=True)

out = Console()

Ids = Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="the ids of letters, or their begins")]
Id = Annotated[str, typer.Argument(metavar="ID", help="the id of a letter, or its begin")]
OfHandler = Annotated[str | None, typer.Option("--handler", help="given up on by this handler")]
OfReason = Annotated[str | None, typer.Option("--reason", help="for this reason")]
OfGroup = Annotated[str | None, typer.Option("--fingerprint", help="for this cause, as `list --groups` names it")]
OfType = Annotated[str | None, typer.Option("--type", help="messages of this type")]
OfSaga = Annotated[UUID | None, typer.Option("--saga", help="messages of this saga")]
Since = Annotated[datetime | None, typer.Option(help="that died at this time (UTC) or later")]
Until = Annotated[datetime | None, typer.Option(help="that died before this time (UTC)")]
All = Annotated[bool, typer.Option("--all", help="all letters that are dead")]
By = Annotated[str | None, typer.Option(help="who does it; by default the user's login")]
Why = Annotated[str, typer.Option(help="why, for the record")]
AppOption = Annotated[str | None, typer.Option("--app", metavar="APP", help="the application, as module:attribute")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]


@dead_letters.command("list")
def list_letters(
    handler: OfHandler = None,
    reason: OfReason = None,
    fingerprint: OfGroup = None,
    message_type: OfType = None,
    saga: OfSaga = None,
    since: Since = None,
    until: Until = None,
    status: Annotated[str, typer.Option(help="dead, replayed, discarded or any")] = "dead",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="how many, newest first")] = 50,
    groups: Annotated[bool, typer.Option("--groups", help="by cause instead")] = False,
    as_json: AsJson = False,
) -> None:
    """List letters, newest first, or their groups."""
    if status not in ("dead", "replayed", "discarded", "any"):
        raise ConfigurationError(f"--status takes dead, replayed, discarded or any, not {status!r}")
    wanted = None if status == "any" else status
    query = Query(None, handler, reason, fingerprint, message_type, saga, wanted, utc_if_any(since), utc_if_any(until))

    async def work(letters: DeadLetters) -> None:
        if groups:
            views.print_groups(out, await letters.groups(query), as_json=as_json)
        else:
            views.print_letters(out, await letters.find(query, limit=limit), as_json=as_json)

    _with_letters(work)


@dead_letters.command("show")
def show_letter(
    letter: Id,
    reveal: Annotated[
        bool, typer.Option("--reveal", help="also what looks like a password, a token and so on")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show all of a letter: body, headers, the error's stack, and who has done what with it."""

    async def work(letters: DeadLetters) -> None:
        await _print_letter(letters, await letters.get(letter), reveal=reveal, as_json=as_json)

    _with_letters(work)


@dead_letters.command("replay")
def replay_letters(
    ids: Ids = None,
    handler: OfHandler = None,
    reason: OfReason = None,
    fingerprint: OfGroup = None,
    message_type: OfType = None,
    saga: OfSaga = None,
    since: Since = None,
    until: Until = None,
    everything: All = False,
    rate: Annotated[float | None, typer.Option(min=0.001, help="letters a second; by default all at once")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would happen, and do nothing")] = False,
    why: Why = "",
    by: By = None,
    app: AppOption = None,
    as_json: AsJson = False,
) -> None:
    """Give letters to the handler that failed, once more. Those of one saga go in their order.

    The exit code is 1 if one is not replayed.
    """
    query = Query(None, handler, reason, fingerprint, message_type, saga, DEAD, utc_if_any(since), utc_if_any(until))
    _refuse_vague(query, ids, everything=everything)
    who = by or process.login()
    printer = views.PlanPrinter(out, dry_run=dry_run, as_json=as_json)

    async def work(letters: DeadLetters) -> None:
        wanted = await _named(letters, query, ids)
        planned = letters.plan(wanted, rate=rate) if dry_run else letters.replay(wanted, rate=rate, by=who, why=why)
        async for each in planned:
            printer.add(each)
        printer.end()

    _with_letters(work, writing=not dry_run, app=app)
    if printer.refused and not dry_run:
        sys.exit(1)


@dead_letters.command("edit")
def edit_letter(
    letter: Id,
    why: Why,
    app: Annotated[str, typer.Option(metavar="APP", help="the application whose handler is to take it")],
    data: Annotated[
        Path | None, typer.Option(help="a file with the new `data`, a JSON object; - for standard input")
    ] = None,
    event: Annotated[
        Path | None, typer.Option(help="a file with the whole event instead, for a letter that cannot be read")
    ] = None,
    by: By = None,
) -> None:
    """Give a letter other data. It is then replayed with these; the original is kept."""
    file = data or event
    if file is None or (data and event):
        raise ConfigurationError("say what is new: --data FILE, or --event FILE")
    if str(file) != "-" and not file.is_file():
        raise ConfigurationError(f"there is no file {file}")
    given = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    new = {"data" if data else "event": given}
    who = by or process.login()

    async def work(letters: DeadLetters) -> None:
        edited = await letters.edit(letter, by=who, why=why, **new)
        await _print_letter(letters, edited, reveal=False, as_json=False)

    _with_letters(work, writing=True, app=app)


@dead_letters.command("discard")
def discard_letters(
    why: Why,
    ids: Ids = None,
    handler: OfHandler = None,
    reason: OfReason = None,
    fingerprint: OfGroup = None,
    message_type: OfType = None,
    saga: OfSaga = None,
    since: Since = None,
    until: Until = None,
    everything: All = False,
    by: By = None,
) -> None:
    """Settle letters without a replay. They stay in the table.

    One that was replayed and still waits to be tried is called back, if it is named by its id.
    """
    query = Query(None, handler, reason, fingerprint, message_type, saga, DEAD, utc_if_any(since), utc_if_any(until))
    _refuse_vague(query, ids, everything=everything)
    who = by or process.login()

    async def work(letters: DeadLetters) -> None:
        wanted = await _named(letters, query, ids)
        count = await letters.discard(wanted, by=who, why=why)
        out.print(f"{count} discarded", highlight=False)
        if wanted.ids is not None and count < len(wanted.ids):
            raise ConfigurationError(
                f"{len(wanted.ids) - count} not discarded: settled already, or being tried; see `dead-letters show ID`"
            )

    _with_letters(work, writing=True)


@dead_letters.command("purge")
def purge_letters(
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", min=0, max=100_000, help="days since it was replayed or discarded")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say how many there are, and delete none")] = False,
) -> None:
    """Delete letters that were replayed or discarded so long ago. What is dead is kept, and what waits to be tried."""

    async def work(letters: DeadLetters) -> None:
        count = await letters.purge(timedelta(days=older_than), dry_run=dry_run)
        out.print(f"{count} {'would be deleted' if dry_run else 'deleted'}", highlight=False)

    _with_letters(work, writing=not dry_run)


async def _print_letter(letters: DeadLetters, letter: Letter, *, reveal: bool, as_json: bool) -> None:
    changes, replay = await letters.changes(letter.id), await letters.replay_of(letter)
    views.print_letter(out, letter, changes, replay, reveal=reveal, as_json=as_json)


def _refuse_vague(query: Query, ids: Sequence[str] | None, *, everything: bool) -> None:
    if (query.is_narrow or bool(ids)) == everything:
        raise ConfigurationError("name letters by their ids or by --handler, --reason and so on, or say --all")


async def _named(letters: DeadLetters, query: Query, references: Sequence[str] | None) -> Query:
    """Return `query` for the letters that were named, if any were."""
    if not references:
        return query
    return replace(query, ids=list(dict.fromkeys([(await letters.get(each)).id for each in references])))


def _consumers(app: App) -> Consumers:
    """Return who takes letters in an application, and what each can read."""
    found = {handler.name: Registry([handler.message]) for handler in app.handlers}
    found[BUS] = app.registry
    if app.definitions:
        found[COORDINATOR] = app.coordinated.registry
    return found


def _with_letters(
    work: Callable[[DeadLetters], Awaitable[None]], *, writing: bool = False, app: str | None = None
) -> None:
    """Let `work` look at the letters, or write: then an SQLite file must not be in use by another process."""
    settings = load_settings()
    process.log_to_stderr("WARNING", settings.log_format)
    consumers = _consumers(load_app(app)) if app else None

    async def working() -> None:
        opened = open_schema if writing else open_reading
        async with opened(settings) as engine:
            clock, ids = SystemClock(), TimeOrderedIds()
            await work(DeadLetters(engine, clock=clock, ids=ids, limits=settings.limits, consumers=consumers))

    process.run(working())
