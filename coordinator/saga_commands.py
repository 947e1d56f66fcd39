"""`coordinator sagas retry|skip|resolve|compensate|cancel|move-deadline|cancel-deadline`: an operator steps in.

Each takes one saga, or the options that say which sagas are meant.
"""

import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any

import typer
from pydantic_core import from_json
from rich.console import Console

from coordinator import process, views
from coordinator.decision import Resolution, Verb
from coordinator.durations import utc
from coordinator.loading import load_app
from coordinator.operator import Operator, open_operator
from coordinator.process import login
from coordinator.search import Query
from coordinator.search_options import OfKey, OfSaga, OfStatus, OfStep, Since, Until, Where, query_of
from coordinator.settings import load_settings
from events.errors import ConfigurationError

out = Console()

AppReference = Annotated[str, typer.Argument(metavar="APP", help="the application as module:attribute")]
Why = Annotated[str, typer.Option(help="why, for the record")]
By = Annotated[str | None, typer.Option(help="who does it; by default the user's login")]
Revision = Annotated[
    int | None, typer.Option(help="of one saga: the revision that you looked at; refuse if it has moved on since")
]
Rate = Annotated[float | None, typer.Option(min=0.001, help="of many: so many a second; by default as fast as it goes")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="of many: say what would be done, and change nothing")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs, of many one object a line")]

_STOPPED = 130  # as a shell says of what Ctrl-C has ended
_SAGA = "SAGA is the id or the business key of one; leave it out where options say which sagas are meant"
_MEANINGS = {
    "STEP": "STEP is a step",
    "HOW": f"HOW is how it has ended: {', '.join(Resolution)}",
    "TIME": "TIME is the new deadline in UTC, as 2026-12-24T12:00",
}


def act_command(verb: Verb, *names: str, of_step: bool = False) -> Callable[..., None]:
    """Return the command that does `verb`.

    Args:
        verb: what it does.
        names: what it takes after the saga.
        of_step: it is about a timer: of the step of the option `--step`, or the saga's own without one.
    """
    takes_data = verb is Verb.RESOLVE
    meaning = "; ".join([_SAGA, *(_MEANINGS[name] for name in names)])
    metavar = " ".join(["[SAGA]", *names])

    def command(
        app: AppReference,
        why: Why,
        target: Annotated[list[str] | None, typer.Argument(metavar=metavar, help=meaning)] = None,
        saga: OfSaga = None,
        status: OfStatus = None,
        key: OfKey = None,
        step: OfStep = None,
        since: Since = None,
        until: Until = None,
        where: Where = None,
        data: Annotated[
            str,
            typer.Option(hidden=not takes_data, help="what the step's handler would have said, as a JSON object"),
        ] = "{}",
        rate: Rate = None,
        dry_run: DryRun = False,
        by: By = None,
        revision: Revision = None,
        as_json: AsJson = False,
    ) -> None:
        query = query_of(saga, status, key, step, since, until, where)
        found = _read_data(data)
        if found and not takes_data:
            raise ConfigurationError(f"--data is for `resolve`; {verb} takes none")
        timer = query.step if of_step else None
        reference, given = _read_target(names, target or [], query, ignored=timer)
        about = {"step": timer, **_read(given)} | ({"data": found} if takes_data else {})
        if reference is None:
            if revision is not None:
                raise ConfigurationError("--revision is of one saga; of many each is refused if it moves on meanwhile")
            step_of_many = query if query.step else replace(query, step=about["step"])
            _act_on_many(app, step_of_many, verb, why, by, rate, dry_run=dry_run, as_json=as_json, about=about)
            return
        if rate is not None or dry_run:
            raise ConfigurationError("--rate and --dry-run are for many sagas")
        _act(app, reference, verb, why, by, revision, as_json=as_json, about=about)

    return command


def add_to(sagas: typer.Typer) -> None:
    """Add the commands to `coordinator sagas`."""
    for name, summary, command in (
        (
            "retry",
            "Send a step's command, or its compensation, again: the outstanding one, or a new attempt after a failure.",
            act_command(Verb.RETRY, "STEP"),
        ),
        (
            "skip",
            "Count a step, or a compensation, that has failed as done: it was seen to by hand, or is not needed.",
            act_command(Verb.SKIP, "STEP"),
        ),
        (
            "resolve",
            "Say how a step has really ended whose answer is missing, or wrong; the saga goes on from there.",
            act_command(Verb.RESOLVE, "STEP", "HOW"),
        ),
        ("compensate", "Undo all that was done, also what could not be undone.", act_command(Verb.COMPENSATE)),
        ("cancel", "Stop a running saga, and undo what it has done.", act_command(Verb.CANCEL)),
        (
            "move-deadline",
            "Give the answer to a step, or its next attempt, another deadline.",
            act_command(Verb.MOVE_DEADLINE, "STEP", "TIME"),
        ),
    ):
        sagas.command(name, help=summary)(command)


def _read_target(
    names: Sequence[str], given: Sequence[str], query: Query, *, ignored: str | None
) -> tuple[str | None, dict[str, str]]:
    """Return the saga, if one is named, and what the other arguments are."""
    if len(given) not in (len(names), len(names) + 1):
        raise ConfigurationError(f"write {' '.join(['[SAGA]', *names])} after the application, not {' '.join(given)!r}")
    reference = given[0] if len(given) > len(names) else None
    narrow = (replace(query, step=None, step_status=None) if ignored and reference else query).is_narrow
    if (reference is not None) == narrow:
        raise ConfigurationError("name one saga, or say with options such as --saga and --status which ones are meant")
    return reference, dict(zip(names, given[-len(names) :], strict=True)) if names else {}


def _read(given: dict[str, str]) -> dict[str, Any]:
    """Return what an act takes, of the arguments as they were written."""
    about: dict[str, Any] = {}
    if "STEP" in given:
        about["step"] = given["STEP"]
    if "HOW" in given:
        if given["HOW"] not in set(Resolution):
            raise ConfigurationError(f"a step has {', '.join(Resolution)}; never {given['HOW']!r}")
        about["resolution"] = Resolution(given["HOW"])
    if "TIME" in given:
        try:
            moment = datetime.fromisoformat(given["TIME"])
        except ValueError:
            raise ConfigurationError(f"{given['TIME']!r} is no time; write 2026-12-24T12:00, in UTC") from None
        about["until"] = utc(moment)
    return about


def _read_data(text: str) -> dict[str, Any]:
    try:
        data = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ConfigurationError(f"--data is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigurationError('--data takes a JSON object, as in --data \'{"charge_id": "c-1"}\'')
    return data


def _act(
    app: str,
    reference: str,
    verb: Verb,
    why: str,
    by: str | None,
    revision: int | None,
    *,
    as_json: bool,
    about: dict[str, Any],
) -> None:
    async def work(operator: Operator) -> None:
        instance = await operator.act(reference, verb, by=by or login(), why=why, revision=revision, **about)
        views.print_instance(out, instance, await operator.store.history(instance.id), as_json=as_json)

    _with_operator(app, work)


def _act_on_many(
    app: str,
    query: Query,
    verb: Verb,
    why: str,
    by: str | None,
    rate: float | None,
    *,
    dry_run: bool,
    as_json: bool,
    about: dict[str, Any],
) -> None:
    """Act, say what became of each saga as soon as it is certain, and add it up: also when Ctrl-C stops it."""
    counts = {"done": 0, "refused": 0, "stopped": 0}

    async def work(operator: Operator) -> None:
        acts = operator.act_on(query, verb, by=by or login(), why=why, rate=rate, dry_run=dry_run, **about)
        with process.when_stopped(acts.stop):
            async for outcome in acts:
                counts["refused" if outcome.refused else "done"] += 1
                views.print_outcome(out, outcome, as_json=as_json)
        counts["stopped"] = int(acts.stopped)
        views.print_sum(out, counts, dry_run=dry_run, as_json=as_json)

    _with_operator(app, work)
    if counts["stopped"] or counts["refused"]:
        sys.exit(_STOPPED if counts["stopped"] else 1)


def _with_operator(app: str, work: Callable[[Operator], Coroutine[Any, Any, None]]) -> None:
    loaded, settings = load_app(app), load_settings()
    process.log_to_stderr("WARNING", settings.log_format)

    async def working() -> None:
        async with open_operator(loaded, settings) as operator:
            await work(operator)

    process.run(working())
