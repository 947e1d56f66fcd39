"""`coordinator dead-letters`: what was given up on is looked at, replayed, edited, discarded."""

import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
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
from events.dead_letters import DEAD
from events.errors import ConfigurationError
from events.ids import TimeOrderedIds
from handlers.replay import DeadLetters, Query, with_data

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
    query = Query(None, handler, reason, fingerprint, message_type, saga, wanted, _utc(since), _utc(until))

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
    since: Since = None,
    until: Until = None,
    everything: All = False,
    rate: Annotated[float | None, typer.Option(min=0.001, help="letters a second; by default all at once")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would happen, and do nothing")] = False,
    why: Annotated[str, typer.Option(help="why, for the record")] = "",
    by: By = None,
    as_json: AsJson = False,
) -> None:
    """Give letters to the handler that failed, once more. Those of one saga go in their order."""
    query = Query(None, handler, reason, fingerprint, message_type, saga, DEAD, _utc(since), _utc(until))
    _refuse_vague(query, ids, everything=everything)

    async def work(letters: DeadLetters) -> None:
        wanted = await _named(letters, query, ids)
        if dry_run:
            done = [planned async for planned in letters.plan(wanted, rate=rate)]
        else:
            done = [planned async for planned in letters.replay(wanted, rate=rate, by=by or process.login(), why=why)]
        views.print_plan(out, done, dry_run=dry_run, as_json=as_json)

    _with_letters(work, writing=not dry_run)


@dead_letters.command("edit")
def edit_letter(
    letter: Id,
    data: Annotated[
        Path | None, typer.Option(help="a file with the new `data`, a JSON object; - for standard input")
    ] = None,
    event: Annotated[
        Path | None, typer.Option(help="a file with the whole event instead, for a letter that cannot be read")
    ] = None,
    why: Annotated[str, typer.Option(help="why, for the record")] = "",
    by: By = None,
) -> None:
    """Give a letter other data. It is then replayed with these; the original is kept."""
    file = data or event
    if file is None or (data and event):
        raise ConfigurationError("say what is new: --data FILE, or --event FILE")
    if str(file) != "-" and not file.is_file():
        raise ConfigurationError(f"there is no file {file}")
    given = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    who = by or process.login()

    async def work(letters: DeadLetters) -> None:
        found = await letters.get(letter)
        body = with_data(found, given) if data else given
        views.print_letter(out, await letters.edit(found.id, body, by=who, why=why), as_json=False)

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
    since: Since = None,
    until: Until = None,
    everything: All = False,
    by: By = None,
) -> None:
    """Settle letters without a replay. They stay in the table."""
    query = Query(None, handler, reason, fingerprint, message_type, saga, DEAD, _utc(since), _utc(until))
    _refuse_vague(query, ids, everything=everything)
    who = by or process.login()

    async def work(letters: DeadLetters) -> None:
        count = await letters.discard(await _named(letters, query, ids), by=who, why=why)
        out.print(f"{count} discarded", highlight=False)

    _with_letters(work, writing=True)


def _refuse_vague(query: Query, ids: Sequence[str] | None, *, everything: bool) -> None:
    if (query.is_narrow or bool(ids)) == everything:
        raise ConfigurationError("name letters by their ids or by --handler, --reason and so on, or say --all")


async def _named(letters: DeadLetters, query: Query, references: Sequence[str] | None) -> Query:
    """Return `query` for the letters that were named, if any were; all of them must be dead."""
    if not references:
        return query
    found = [await letters.get(each) for each in references]
    for letter in found:
        if letter.status != DEAD:
            raise ConfigurationError(f"dead letter {letter.id} is {letter.status}; only what is dead can be settled")
    return replace(query, ids=[letter.id for letter in found])


def _utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment else None


def _with_letters(work: Callable[[DeadLetters], Awaitable[None]], *, writing: bool = False) -> None:
    """Let `work` look at the letters, or write: then an SQLite file must not be in use by another process."""
    settings = load_settings()
    process.log_to_stderr("WARNING", settings.log_format)

    async def working() -> None:
        opened = open_schema if writing else open_reading
        async with opened(settings) as engine:
            await work(DeadLetters(engine, clock=SystemClock(), ids=TimeOrderedIds(), limits=settings.limits))

    process.run(working())
