"""`coordinator verify` and `coordinator sagas archive`: histories are checked, and taken out of the database."""

import sys
from collections import Counter
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from coordinator import process
from coordinator.archive import Archive, ArchiveFile
from coordinator.durations import age, ago, utc_if_any
from coordinator.history_views import print_archived, print_checked, print_finding, print_planned
from coordinator.node import open_reading, open_schema
from coordinator.settings import load_settings
from coordinator.verification import Verification
from events.clock import SystemClock
from events.errors import ConfigurationError
from events.storeclock import StoreClock

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
            verification = Verification(engine, SystemClock(), since=utc_if_any(since))
            counts: Counter[str] = Counter()
            async for finding in verification.findings():
                counts[finding.invariant] += 1
                if counts.total() <= most:
                    print_finding(out, finding, as_json=as_json)
            print_checked(out, verification.checked, counts, as_json=as_json)
            return not counts

    if not process.run(work()):
        sys.exit(1)


def archive(
    finished_before: Annotated[
        str, typer.Option(metavar="AGE", help="sagas that ended so long ago: 30d, 12h; longer than any message waits")
    ],
    to: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl.gz", help="where they are written; what is there stays")
    ] = None,
    discard: Annotated[bool, typer.Option("--discard", help="keep nothing of them instead")] = False,
    keys_kept: Annotated[
        str, typer.Option(metavar="AGE", help="for how long after its end a start with the same key is a duplicate")
    ] = "365d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say how many there are, and change nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Write sagas that have ended to a file, and delete them. May be stopped at any time, and run again."""
    before, keys = age(finished_before), age(keys_kept)
    if not dry_run and (to is None) is not discard:
        raise ConfigurationError("say where they are written: --to FILE.jsonl.gz; or --discard to keep nothing")
    settings = load_settings()
    process.log_to_stderr("WARNING", settings.log_format)

    async def work() -> None:
        opened = open_reading if dry_run else open_schema
        async with opened(settings) as engine:
            clock = StoreClock(engine, SystemClock())
            await clock.calibrate()
            now = clock.now()
            archiving = Archive(engine, SystemClock(), before=ago(before, now), keys_before=ago(keys, now))
            if dry_run:
                print_planned(out, *await archiving.count(), as_json=as_json)
                return
            with ArchiveFile(to) if to else nullcontext() as file:
                async for _ in archiving.run(file):
                    pass
            print_archived(out, archiving.done, as_json=as_json)

    process.run(work())
