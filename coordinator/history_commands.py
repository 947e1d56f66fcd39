"""`coordinator verify`: checks histories and what must hold of every saga."""

import sys
from collections import Counter
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console

from coordinator import process
from coordinator.history_views import print_checked, print_finding
from coordinator.node import open_reading
from coordinator.settings import load_settings
from coordinator.verification import Verification
from events.clock import SystemClock

out = Console()

AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]


def verify(
    since: Annotated[
        datetime | None, typer.Option(help="only sagas that have moved at this time (UTC) or later")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="how many findings are printed; all are counted")] = 100,
    as_json: AsJson = False,
) -> None:
    """Check that histories are whole and what must hold of sagas, while they run. The exit code is 1 if it does not."""
    settings = load_settings()

    async def work() -> bool:
        async with open_reading(settings) as engine:
            verification = Verification(engine, SystemClock(), since=since and since.replace(tzinfo=UTC))
            counts: Counter[str] = Counter()
            async for finding in verification.findings():
                counts[finding.invariant] += 1
                if counts.total() <= most:
                    print_finding(out, finding, as_json=as_json)
            print_checked(out, verification.checked, counts, as_json=as_json)
            return not counts

    if not process.run(work()):
        sys.exit(1)
