"""The options with which every command says which sagas it means."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import typer

from coordinator.durations import utc_if_any
from coordinator.instance import Status, StepStatus
from coordinator.search import Query
from events.errors import ConfigurationError

OfSaga = Annotated[str | None, typer.Option("--saga", help="of this saga")]
OfStatus = Annotated[list[Status] | None, typer.Option("--status", help="with this status; may be repeated")]
OfKey = Annotated[str | None, typer.Option("--key", help="with this business key")]
OfStep = Annotated[
    str | None, typer.Option("--step", metavar="STEP[=STATUS]", help="that have begun this step, or where it stands so")
]
Since = Annotated[datetime | None, typer.Option(help="started at this time (UTC) or later")]
Until = Annotated[datetime | None, typer.Option(help="started before this time (UTC)")]
Where = Annotated[
    list[str] | None,
    typer.Option(metavar="FIELD=VALUE", help="with this in their state; may be repeated; names of a path have dots"),
]


def query_of(
    saga: str | None,
    status: Sequence[Status] | None,
    key: str | None,
    step: str | None,
    since: datetime | None,
    until: datetime | None,
    where: Sequence[str] | None,
) -> Query:
    """Return what the options say.

    Raises:
        ConfigurationError: one of them makes no sense.
    """
    name, has_status, step_status = (step or "").partition("=")
    if has_status and step_status not in set(StepStatus):
        raise ConfigurationError(f"a step is {', '.join(StepStatus)}; never {step_status!r}")
    return Query(
        saga,
        tuple(status or ()),
        key,
        name or None,
        StepStatus(step_status) if has_status else None,
        utc_if_any(since),
        utc_if_any(until),
        tuple(_field(each) for each in where or ()),
    )


def _field(given: str) -> tuple[str, str]:
    path, equals, value = given.partition("=")
    if not equals:
        raise ConfigurationError(f"--where takes FIELD=VALUE, not {given!r}")
    return path, value
