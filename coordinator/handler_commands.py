"""`coordinator handlers`: look at handlers, pause and resume them, and set their limits while they run."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from coordinator import process
from coordinator.handler_views import print_changes, print_overview, print_setting
from coordinator.node import open_reading, open_schema
from coordinator.settings import load_settings
from events.clock import SystemClock
from events.errors import ConfigurationError
from events.ids import TimeOrderedIds
from events.storeclock import StoreClock
from handlers.operations import Operations

handlers = typer.Typer(help="Look at handlers, pause them, set their limits.", no_args_is_help=True)

out = Console()

Name = Annotated[str, typer.Argument(metavar="HANDLER", help="the name of a handler")]
By = Annotated[str | None, typer.Option(help="who does it; by default the user's login")]
Why = Annotated[str, typer.Option(help="why, for the record")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]


@handlers.command("list")
def list_handlers(as_json: AsJson = False) -> None:
    """List handlers: what runs, what waits, what was given up on, and what an operator has set."""

    async def work(operations: Operations, clock: StoreClock) -> None:
        print_overview(out, await operations.overview(clock.now()), as_json=as_json)

    _with_operations(work)


@handlers.command("pause")
def pause_handler(name: Name, why: Why = "", by: By = None) -> None:
    """Stop a handler in all processes. Its messages wait in their queue."""
    _change(name, by, why, paused=True)


@handlers.command("resume")
def resume_handler(name: Name, why: Why = "", by: By = None) -> None:
    """Let a paused handler go on."""
    _change(name, by, why, paused=False)


@handlers.command("set")
def set_limits(
    name: Name,
    rate: Annotated[float | None, typer.Option(help="messages a second, in all processes together")] = None,
    concurrency: Annotated[int | None, typer.Option(help="messages at a time, in one process")] = None,
    attempts: Annotated[int | None, typer.Option(help="tries in all")] = None,
    quick: Annotated[int | None, typer.Option(help="failures followed by a try in process")] = None,
    first: Annotated[float | None, typer.Option(help="seconds: bound of the first longer wait")] = None,
    factor: Annotated[float | None, typer.Option(help="growth of the bounds")] = None,
    most: Annotated[float | None, typer.Option(help="seconds: the largest bound")] = None,
    budget: Annotated[float | None, typer.Option(help="seconds from the first try to the last")] = None,
    jitter: Annotated[str | None, typer.Option(help="full or none")] = None,
    crashes: Annotated[int | None, typer.Option(help="processes that a message may end")] = None,
    reset: Annotated[bool, typer.Option("--reset", help="first forget what was set: the code's limits hold")] = False,
    why: Why = "",
    by: By = None,
) -> None:
    """Change limits of a handler in all processes. What is not given stays as it is."""
    given = {
        "attempts": attempts,
        "quick": quick,
        "first": first,
        "factor": factor,
        "most": most,
        "budget": budget,
        "jitter": jitter,
        "crashes": crashes,
    }
    changes: dict[str, Any] = {"rate": rate, "concurrency": concurrency}
    changes = {key: value for key, value in changes.items() if value is not None}
    if retry := {key: value for key, value in given.items() if value is not None}:
        changes["retry"] = retry
    if not changes and not reset:
        raise ConfigurationError("say what to set: --rate, --concurrency, --attempts and so on, or --reset")
    _change(name, by, why, reset=reset, **changes)


@handlers.command("changes")
def list_changes(
    name: Annotated[str | None, typer.Argument(metavar="HANDLER", help="of this handler only")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="how many, newest first")] = 50,
    as_json: AsJson = False,
) -> None:
    """List who has changed what, when and why."""

    async def work(operations: Operations, _: StoreClock) -> None:
        print_changes(out, await operations.changes(name, limit), as_json=as_json)

    _with_operations(work)


def _change(name: str, by: str | None, why: str, *, reset: bool = False, **changes: Any) -> None:
    who = by or process.login()

    async def work(operations: Operations, clock: StoreClock) -> None:
        known = {each.name for each in await operations.overview(clock.now())}
        if name not in known:
            raise ConfigurationError(f"no handler {name} runs here; known are: {', '.join(sorted(known)) or 'none'}")
        about: dict[str, Any] = {"by": who, "reason": why, "now": clock.now()}
        if reset:
            print_setting(out, name, await operations.reset(name, **about))
        if changes:
            print_setting(out, name, await operations.change(name, **about, **changes))

    _with_operations(work, writing=True)


def _with_operations(work: Callable[[Operations, StoreClock], Awaitable[None]], *, writing: bool = False) -> None:
    """Let `work` look at the database, or write to it: then an SQLite file must not be in use by another process."""
    settings = load_settings()
    process.log_to_stderr("WARNING", settings.log_format)

    async def working() -> None:
        opened = open_schema if writing else open_reading
        async with opened(settings) as engine:
            clock = StoreClock(engine, SystemClock())
            await clock.calibrate()
            await work(Operations(engine, ids=TimeOrderedIds()), clock)

    process.run(working())
