"""`coordinator timers list|move|cancel`: deadlines and next attempts, of all sagas."""

from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console

from coordinator import process, views
from coordinator.decision import Verb
from coordinator.durations import utc_if_any
from coordinator.node import open_reading
from coordinator.saga_commands import AsJson, act_command
from coordinator.search_options import OfKey, OfSaga, OfStatus, OfStep, Since, Until, Where, query_of
from coordinator.settings import load_settings
from coordinator.store import Store
from coordinator.timers import find_timers
from events.clock import SystemClock

timers = typer.Typer(help="Look at deadlines and next attempts, move and cancel them.", no_args_is_help=True)

out = Console()


@timers.command("list")
def list_timers(
    saga: OfSaga = None,
    status: OfStatus = None,
    key: OfKey = None,
    step: OfStep = None,
    since: Since = None,
    until: Until = None,
    where: Where = None,
    due_before: Annotated[datetime | None, typer.Option(help="due before this time (UTC)")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="how many, the earliest first")] = 50,
    as_json: AsJson = False,
) -> None:
    """List what is due, the earliest first."""
    query, settings = query_of(saga, status, key, step, since, until, where), load_settings()
    before = utc_if_any(due_before)

    async def looking() -> None:
        async with open_reading(settings) as engine:
            found = await find_timers(Store(engine, SystemClock()), query, before=before, limit=limit)
            views.print_timers(out, found, as_json=as_json)

    process.run(looking())


timers.command("move", help="Give a step (--step), or the saga itself, another deadline.")(
    act_command(Verb.MOVE_DEADLINE, "TIME", of_step=True)
)
timers.command("cancel", help="Let the answer to a step (--step), or the saga itself, take as long as it takes.")(
    act_command(Verb.CANCEL_DEADLINE, of_step=True)
)
