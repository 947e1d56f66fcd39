"""The command line: `coordinator run shop:app` and its companions.

Tables and progress for people go to standard output, `--json` for programs; errors are one plain line on
standard error that says what to do.
"""

import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn
from uuid import UUID

import typer
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError

from coordinator import process, saga_commands, version_commands, views
from coordinator.chart_text import text_chart
from coordinator.charts import mermaid
from coordinator.dead_letter_commands import dead_letters
from coordinator.handler_commands import handlers
from coordinator.health import serving_health
from coordinator.history_commands import archive, verify
from coordinator.instance import Instance
from coordinator.lifecycle_commands import lifecycles
from coordinator.lines import Lines
from coordinator.loading import load_app
from coordinator.node import Node, open_bus, open_reading, open_schema
from coordinator.publishing import publish_lines
from coordinator.search_options import OfKey, OfSaga, OfStatus, OfStep, Since, Until, Where, query_of
from coordinator.settings import load_settings
from coordinator.store import Store
from coordinator.timer_commands import timers
from events.clock import SystemClock
from events.dead_letters import storable
from events.errors import ConfigurationError, CoordinatorError

cli = typer.Typer(
    help="Sagas over RabbitMQ and SQL. Servers come from COORDINATOR_BROKER_URL and COORDINATOR_DATABASE_URL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
sagas = typer.Typer(help="Look at sagas, and step in.", no_args_is_help=True)
database = typer.Typer(help="The database schema.", no_args_is_help=True)
cli.add_typer(sagas, name="sagas")
cli.add_typer(handlers, name="handlers")
cli.add_typer(dead_letters, name="dead-letters")
cli.add_typer(lifecycles, name="lifecycles")
cli.add_typer(timers, name="timers")
cli.add_typer(database, name="db")

AppReference = Annotated[str, typer.Argument(metavar="APP", help="the application as module:attribute")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
Reference = Annotated[str, typer.Argument(metavar="SAGA", help="the id or the business key of a saga")]

out = Console()

_OTHER_SCHEMA = ("no such table", "no such column", "UndefinedTableError", "UndefinedColumnError")


class ChartFormat(StrEnum):
    """How a flowchart is written."""

    MERMAID = "mermaid"
    ASCII = "ascii"


def main() -> None:
    """Run the command line; errors of ours and of the servers are one line, and exit code 1."""
    try:
        _refuse_bytes(sys.argv)
        cli()
    except CoordinatorError as error:
        _fail(str(error))
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error)
        if any(each in cause for each in _OTHER_SCHEMA):
            _fail(
                "the database has no schema yet, or an old one; run `coordinator db upgrade`, or start the application"
            )
        _fail(f"the database refuses: {cause}")
    except OSError as error:
        if error.filename:
            _fail(f"{error.filename} cannot be opened: {error.strerror}")
        _fail(f"a server cannot be reached: {error}; check COORDINATOR_BROKER_URL and COORDINATOR_DATABASE_URL")


def _refuse_bytes(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not UTF-8: no database could look for them, or keep them."""
    for each in arguments:
        if storable(each) != each:
            raise ConfigurationError(f"{each!r} is no text in UTF-8; write it anew")


def _say_running(what: str) -> None:
    out.print(f"{what} is running; stop it with Ctrl-C", highlight=False)


def _fail(text: str) -> NoReturn:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)  # noqa: T201  # this is the command line
    sys.exit(1)


@cli.command()
def run(
    app: AppReference,
    only: Annotated[
        str | None, typer.Option(metavar="coordinator|handlers", help="run this part only in this process")
    ] = None,
    handler: Annotated[list[str] | None, typer.Option(help="of the handlers, run these only; may be repeated")] = None,
) -> None:
    """Run an application: its sagas, its handlers and the relay, until SIGTERM or Ctrl-C."""
    if only not in (None, "coordinator", "handlers"):
        raise ConfigurationError(f"--only takes coordinator or handlers, not {only!r}")
    settings = load_settings()
    process.log_to_stderr(settings.log_level, settings.log_format)
    loaded = load_app(app)
    handlers = False if only == "coordinator" else frozenset(handler) if handler else True

    async def work() -> None:
        def node() -> Node:
            return Node(loaded, settings, coordinator=only != "handlers", handlers=handlers)

        async with AsyncExitStack() as stack:
            await stack.enter_async_context(process.exits_when_stalled(settings.max_stall, SystemClock()))
            running = await process.enter_when_up(stack, node, patience=settings.wait, clock=SystemClock())
            await stack.enter_async_context(serving_health(running, settings.health))
            await stack.enter_async_context(
                process.exits_when_overdue(settings.max_stall, SystemClock(), lambda: running.overdue)
            )
            await process.until_stopped(lambda: _say_running(loaded.name))
            stopping()

    service = f"{loaded.name}-{only}" if only else loaded.name
    with process.traced(service), process.shutdown_within(settings.grace + process.TIDY_UP) as stopping:
        process.run(work())


@cli.command()
def relay() -> None:
    """Publish the outbox of a database, and nothing else, until SIGTERM or Ctrl-C."""
    settings = load_settings()
    process.log_to_stderr(settings.log_level, settings.log_format)

    async def work() -> None:
        @asynccontextmanager
        async def opened() -> AsyncIterator[None]:
            async with open_schema(settings) as engine, open_bus(settings, engine):
                yield

        async with AsyncExitStack() as stack:
            await stack.enter_async_context(process.exits_when_stalled(settings.max_stall, SystemClock()))
            await process.enter_when_up(stack, opened, patience=settings.wait, clock=SystemClock())
            await process.until_stopped(lambda: _say_running("the relay"))
            stopping()

    with process.traced("relay"), process.shutdown_within(process.TIDY_UP) as stopping:
        process.run(work())


@cli.command()
def publish(
    file: Annotated[Path, typer.Argument(help="CloudEvents, one JSON object a line; - for standard input")],
    app: Annotated[
        str | None, typer.Option(metavar="APP", help="check the events against this application before sending")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Publish the events of a file. Lines that are no events are named and left out; the exit code is then 1."""
    settings = load_settings()
    process.log_to_stderr("WARNING", settings.log_format)
    loaded = load_app(app) if app else None
    if str(file) != "-" and not file.is_file():
        raise ConfigurationError(f"there is no file {file}")

    async def work() -> bool:
        name, queues = (loaded.name, loaded.queues) if loaded else (None, [])
        async with (
            open_schema(settings) as engine,
            open_bus(settings, engine, application=name, queues=queues) as (bus, _relay),
        ):
            with sys.stdin.buffer if str(file) == "-" else file.open("rb") as lines:
                return await publish_lines(lines, bus, loaded, settings.limits, out, as_json=as_json)

    with process.traced("publish"):
        good = process.run(work())
    if not good:
        sys.exit(1)


@cli.command()
def demo(
    directory: Annotated[Path, typer.Option(help="where the demonstration keeps its files")] = Path(".demo"),
    events: Annotated[Path | None, typer.Option(help="CloudEvents to process instead of the ones it brings")] = None,
    as_json: AsJson = False,
) -> None:
    """Process a file of sign-ups and orders, some of which fail, with local stand-ins for all third parties."""
    from coordinator.demo import run_demo  # noqa: PLC0415  # needs the extra `demo`

    process.log_to_stderr("CRITICAL", "text")  # its failures are on purpose, and counted at the end
    with process.traced("demo"):
        code = process.run(run_demo(directory=directory, events=events, console=out, as_json=as_json))
    sys.exit(code)


@sagas.command("list")
def list_sagas(
    saga: OfSaga = None,
    status: OfStatus = None,
    key: OfKey = None,
    step: OfStep = None,
    since: Since = None,
    until: Until = None,
    where: Where = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="how many, newest first")] = 50,
    after: Annotated[UUID | None, typer.Option(help="go on after this one, the last of the page before")] = None,
    as_json: AsJson = False,
) -> None:
    """List sagas, newest first, and count all there are by status."""
    query = query_of(saga, status, key, step, since, until, where)

    async def work(store: Store) -> None:
        found = await store.list(query, limit=limit, after=after)
        views.print_list(out, found, await store.count_by_status(), as_json=as_json)

    _with_store(work)


@sagas.command("show")
def show_saga(reference: Reference, as_json: AsJson = False) -> None:
    """Show a saga: where it stands, its steps, and its history."""

    async def work(store: Store) -> None:
        for instance in await _find(store, reference):
            history, place = await store.history(instance.id), await Lines(store).place(instance.id)
            items = await store.open_items(instance.id)
            views.print_instance(out, instance, history, place=place, items=items, as_json=as_json)

    _with_store(work)


@sagas.command("chart")
def chart_saga(
    app: AppReference,
    saga: Annotated[str | None, typer.Argument(help="the name of a saga; by default all of the application")] = None,
    of: Annotated[
        str | None, typer.Option(metavar="SAGA", help="say where this saga stands: its id or business key")
    ] = None,
    form: Annotated[
        ChartFormat, typer.Option("--format", help="for a browser, or for a terminal")
    ] = ChartFormat.MERMAID,
) -> None:
    """Print a saga as a flowchart."""
    draw = mermaid if form is ChartFormat.MERMAID else text_chart
    definitions = {(each.name, each.version): each for each in load_app(app).definitions}
    others = list(definitions.values())
    if saga is not None and saga not in {name for name, _ in definitions}:
        names = ", ".join(sorted({name for name, _ in definitions})) or "none"
        raise ConfigurationError(f"{app} has no saga called {saga}; it has: {names}")

    async def work(store: Store) -> None:
        for instance in await _find(store, of or ""):
            definition = definitions.get((instance.saga, instance.version))
            if definition is None:
                raise ConfigurationError(f"{app} has no saga {instance.saga} version {instance.version}")
            if saga in (None, instance.saga):
                out.file.write(draw(definition, instance, others))

    if of is not None:
        _with_store(work)
        return
    for definition in definitions.values():
        if saga in (None, definition.name):
            out.file.write(draw(definition, None, others))


saga_commands.add_to(sagas)
cli.command()(verify)
sagas.command("archive")(archive)
sagas.command("versions")(version_commands.list_versions)
sagas.command("forget-version")(version_commands.forget_version)
sagas.command("migrate")(version_commands.migrate_sagas)
sagas.command("export")(version_commands.export_sagas)
sagas.command("check")(version_commands.check_sagas)


@database.command("upgrade")
def upgrade_database() -> None:
    """Bring the schema up to date. Safe to run from several machines at once."""
    settings = load_settings()
    process.log_to_stderr("WARNING", settings.log_format)

    async def work() -> None:
        async with open_schema(settings.model_copy(update={"migrate": True})):
            pass

    process.run(work())
    current_database()


@database.command("current")
def current_database(as_json: AsJson = False) -> None:
    """Say at which revision the schema is, and which one this version needs."""

    async def work(store: Store) -> None:
        await views.print_revision(out, store.engine, as_json=as_json)

    _with_store(work)


async def _find(store: Store, reference: str) -> list[Instance]:
    found = await store.find(reference)
    if not found:
        raise ConfigurationError(f"there is no saga with the id or business key {reference!r}")
    return found


def _with_store(work: Callable[[Store], Coroutine[Any, Any, None]]) -> None:
    """Let `work` look at the store; an SQLite file may be in use by another process meanwhile."""
    settings = load_settings()

    async def looking() -> None:
        async with open_reading(settings) as engine:
            await work(Store(engine, SystemClock()))

    process.run(looking())
