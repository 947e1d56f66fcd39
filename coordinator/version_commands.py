"""`coordinator sagas versions|forget-version|migrate|export|check`: versions of sagas, and what is left of them."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from coordinator import process
from coordinator.app import App
from coordinator.exports import export, read
from coordinator.loading import load_app
from coordinator.migrator import Migrator, Report
from coordinator.node import open_reading, open_schema
from coordinator.operator import open_operator
from coordinator.reruns import Verdict
from coordinator.search import Query
from coordinator.search_options import OfKey, OfSaga, OfStatus, OfStep, Since, Until, Where, query_of
from coordinator.settings import load_settings
from coordinator.store import Store
from coordinator.versions import VersionCount, Versions
from coordinator.views import plain, print_json, print_table
from events.clock import SystemClock
from events.errors import ConfigurationError

_DIFFERS = 3  # the exit code of a check where nothing would go another way; 2 is that of a wrong command line

out = Console()

AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
AppOption = Annotated[
    str | None, typer.Option("--app", metavar="APP", help="say what this application has the code of: module:attribute")
]
AppReference = Annotated[str, typer.Argument(metavar="APP", help="the application as module:attribute")]
By = Annotated[str | None, typer.Option(help="who does it; by default the user's login")]
SagaName = Annotated[str, typer.Argument(metavar="NAME", help="the name of a saga")]


def list_versions(app: AppOption = None, as_json: AsJson = False) -> None:
    """List the versions of all sagas, and how many instances each has."""
    loaded, settings = load_app(app) if app else None, load_settings()

    async def work() -> None:
        async with open_reading(settings) as engine:
            print_versions(await Versions(engine).count(), loaded, as_json=as_json)

    process.run(work())


def forget_version(
    saga: SagaName,
    version: Annotated[int, typer.Argument(metavar="VERSION", min=1, max=2**31 - 1, help="its version")],
) -> None:
    """Forget what a version was like, so that its definition may change; refused while it has instances in flight."""
    settings = load_settings()
    process.log_to_stderr("WARNING", settings.log_format)

    async def work() -> None:
        async with open_schema(settings) as engine:
            await Versions(engine).forget(saga, version)

    process.run(work())
    out.print(f"forgot version {version} of {saga}", highlight=False)


def migrate_sagas(
    app: AppReference,
    saga: SagaName,
    to: Annotated[int, typer.Option(help="the version that they get")],
    why: Annotated[str, typer.Option(help="why, for the record; a dry run needs none")] = "",
    by: By = None,
    limit: Annotated[int | None, typer.Option(min=1, help="how many at most, the oldest first")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would happen, and change nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Take all instances that have not ended over into another version. The exit code is 1 if some must stay."""
    loaded, settings = load_app(app), load_settings()
    process.log_to_stderr("WARNING", settings.log_format)

    async def rehearse() -> Report:
        async with open_reading(settings) as engine:
            await Versions(engine).check(loaded.definitions)
            return await Migrator(loaded.coordinated, Store(engine, SystemClock())).rehearse(saga, to, limit=limit)

    async def work() -> Report:
        async with open_operator(loaded, settings) as operator:
            return await operator.migrate(saga, to, by=by or process.login(), why=why, limit=limit)

    report = process.run(rehearse() if dry_run else work())
    print_report(report, dry_run=dry_run, as_json=as_json)
    if report.stay:
        sys.exit(1)


def export_sagas(
    saga: OfSaga = None,
    status: OfStatus = None,
    key: OfKey = None,
    step: OfStep = None,
    since: Since = None,
    until: Until = None,
    where: Where = None,
) -> None:
    """Write sagas with all that was decided on, one JSON object a line; by default those that have not ended."""
    query, settings = query_of(saga, status, key, step, since, until, where), load_settings()

    async def work() -> None:
        async with open_reading(settings) as engine:
            async for document in export(Store(engine, SystemClock()), query):
                print_json(out, document)

    process.run(work())


def check_sagas(
    app: AppReference,
    file: Annotated[
        Path | None, typer.Argument(help="what `coordinator sagas export` has written; - for standard input")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="take the sagas of the database that have not ended")] = False,
    as_json: AsJson = False,
) -> None:
    """Decide again on all that was decided on, with the code at hand.

    The exit code is 1 if a saga would go another way, or contradict itself; 3 if one would only have said what is over
    with other words.
    """
    if live is (file is not None):
        raise ConfigurationError("say what to check: a file, or --live")
    if file is not None and str(file) != "-" and not file.is_file():
        raise ConfigurationError(f"there is no file {file}")
    loaded, settings = load_app(app), load_settings()
    process.log_to_stderr("CRITICAL", settings.log_format)  # what the code says is in the result
    verdict = Verdict()

    async def work() -> None:
        async with open_reading(settings) as engine:
            names = {each.name for each in loaded.definitions}
            async for document in export(Store(engine, SystemClock()), Query()):
                if document["saga"] in names:
                    verdict.take(loaded.definitions, document)

    if file is None:
        process.run(work())
    else:
        with sys.stdin if str(file) == "-" else file.open(encoding="utf-8") as lines:
            for document in read(lines):
                verdict.take(loaded.definitions, document)
    print_verdict(verdict, as_json=as_json)
    if verdict.broken or verdict.differing:
        sys.exit(1 if verdict.broken else _DIFFERS)


def print_verdict(verdict: Verdict, *, as_json: bool) -> None:
    """Print how many sagas would go the way that they have gone, and where others would not."""
    if as_json:
        broken, differing = ([asdict(each) for each in found] for found in (verdict.broken, verdict.differing))
        print_json(out, {"same": verdict.same, "broken": broken, "differing": differing, "unclear": verdict.unclear})
        return
    differing_too = f"{len(verdict.differing)} with other words, " if verdict.differing else ""
    counts = f"{verdict.same} would go the same way, {differing_too}{len(verdict.broken)} would not"
    out.print(counts, highlight=False)
    if deviations := [*verdict.broken, *verdict.differing]:
        table = Table("", "saga", Column("key", overflow="fold"), Column("revision", justify="right"), "was", "now")
        for each in deviations:
            name = f"{each.saga} v{each.version}"
            table.add_row(each.weight, name, plain(each.key), str(each.revision), each.kind, plain(each.what))
        print_table(out, table)
    for reason, number in verdict.unclear.items():
        out.print(f"{number} cannot be told: {reason}", highlight=False, markup=False)


def print_report(report: Report, *, dry_run: bool, as_json: bool) -> None:
    """Print how many instances were migrated, and which others stay, by reason."""
    if as_json:
        stay = [{"reason": reason, "sagas": [str(each) for each in ids]} for reason, ids in report.stay.items()]
        print_json(out, {"dry_run": dry_run, "migrated": report.moved, "stay": stay})
        return
    out.print(f"{report.moved} {'can be' if dry_run else 'were'} migrated", highlight=False)
    if report.stay:
        table = Table(Column("stay", justify="right"), "because", "for example")
        for reason, ids in sorted(report.stay.items(), key=lambda item: -len(item[1])):
            table.add_row(str(len(ids)), plain(reason), str(ids[0]))
        print_table(out, table)


def print_versions(counts: Sequence[VersionCount], app: App | None, *, as_json: bool) -> None:
    """Print a row for each version; with an application also what that does with it."""
    if as_json:
        print_json(
            out,
            [
                {
                    "saga": each.saga,
                    "version": each.version,
                    "first_seen": each.first_seen.isoformat() if each.first_seen else None,
                    "in_flight": each.in_flight,
                    "needs_attention": each.stuck,
                    "ended": each.ended,
                    **({"code": _code_of(each, app)} if app else {}),
                }
                for each in counts
            ],
        )
        return
    numbers = [Column(name, justify="right") for name in ("in flight", "needs attention", "ended")]
    table = Table("saga", Column("version", justify="right"), "first seen", *numbers, *(["code"] if app else []))
    for each in counts:
        table.add_row(
            each.saga,
            str(each.version),
            f"{each.first_seen:%Y-%m-%d %H:%M}" if each.first_seen else "",
            *(str(number) if number else "" for number in (each.in_flight, each.stuck, each.ended)),
            *([_code_of(each, app)] if app else []),
        )
    print_table(out, table)


def _code_of(version: VersionCount, app: App) -> str:
    """Say what an application does with a version."""
    key = (version.saga, version.version)
    starting = [each.definition.version for each in app.sagas if each.definition.name == version.saga]
    if version.version == max(starting, default=None):
        return "starts new ones"
    return "finishes" if key in {(each.name, each.version) for each in app.definitions} else "missing"
