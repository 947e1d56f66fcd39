"""`coordinator sagas retry|skip|resolve|compensate|cancel|move-deadline`: an operator steps in."""

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console

from coordinator import process, views
from coordinator.decision import Resolution, Verb
from coordinator.loading import load_app
from coordinator.operator import open_operator
from coordinator.process import login
from coordinator.settings import load_settings
from events.errors import ConfigurationError

out = Console()

AppReference = Annotated[str, typer.Argument(metavar="APP", help="the application as module:attribute")]
Reference = Annotated[str, typer.Argument(metavar="SAGA", help="the id or the business key of a saga")]
StepName = Annotated[str, typer.Argument(metavar="STEP", help="the step")]
Why = Annotated[str, typer.Option(help="why, for the record")]
By = Annotated[str | None, typer.Option(help="who does it; by default the user's login")]
Revision = Annotated[
    int | None, typer.Option(help="the revision that you looked at: refuse if the saga has moved on since")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]


def retry_step(
    app: AppReference,
    saga: Reference,
    step: StepName,
    why: Why,
    by: By = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Send a step's command, or its compensation, again: the outstanding one, or a new attempt after a failure."""
    _act(app, saga, Verb.RETRY, why, by, revision, as_json=as_json, step=step)


def skip_step(
    app: AppReference,
    saga: Reference,
    step: StepName,
    why: Why,
    by: By = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Count a step, or a compensation, that has failed as done: it was seen to by hand, or is not needed."""
    _act(app, saga, Verb.SKIP, why, by, revision, as_json=as_json, step=step)


def resolve_step(
    app: AppReference,
    saga: Reference,
    step: StepName,
    resolution: Annotated[Resolution, typer.Argument(metavar="HOW", help="how it has ended: " + ", ".join(Resolution))],
    why: Why,
    data: Annotated[str, typer.Option(help="what its handler would have said, as a JSON object")] = "{}",
    by: By = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Say how a step has really ended whose answer is missing, or wrong; the saga goes on from there."""
    about = {"step": step, "resolution": resolution, "data": _read_data(data)}
    _act(app, saga, Verb.RESOLVE, why, by, revision, as_json=as_json, **about)


def compensate_saga(
    app: AppReference, saga: Reference, why: Why, by: By = None, revision: Revision = None, as_json: AsJson = False
) -> None:
    """Undo all that was done, also what could not be undone before."""
    _act(app, saga, Verb.COMPENSATE, why, by, revision, as_json=as_json)


def cancel_saga(
    app: AppReference, saga: Reference, why: Why, by: By = None, revision: Revision = None, as_json: AsJson = False
) -> None:
    """Stop a running saga, and undo what it has done."""
    _act(app, saga, Verb.CANCEL, why, by, revision, as_json=as_json)


def move_deadline(
    app: AppReference,
    saga: Reference,
    step: StepName,
    until: Annotated[datetime, typer.Argument(metavar="TIME", help="the new deadline (UTC)")],
    why: Why,
    by: By = None,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Give the answer to a step, or its next attempt, another deadline."""
    _act(app, saga, Verb.MOVE_DEADLINE, why, by, revision, as_json=as_json, step=step, until=until.replace(tzinfo=UTC))


def _read_data(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"--data is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigurationError('--data takes a JSON object, as in --data \'{"charge_id": "c-1"}\'')
    return data


def _act(
    app: str, reference: str, verb: Verb, why: str, by: str | None, revision: int | None, *, as_json: bool, **about: Any
) -> None:
    loaded, settings, who = load_app(app), load_settings(), by or login()
    process.log_to_stderr("WARNING", settings.log_format)

    async def work() -> None:
        async with open_operator(loaded, settings) as operator:
            instance = await operator.act(reference, verb, by=who, why=why, revision=revision, **about)
            views.print_instance(out, instance, await operator.store.history(instance.id), as_json=as_json)

    process.run(work())
