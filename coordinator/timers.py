"""What happens by itself when its time comes: deadlines of answers and of sagas, next attempts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from coordinator.instance import Instance, StepStatus
from coordinator.search import Query
from coordinator.store import Store

_PAGE = 200
_WHAT = {
    StepStatus.RUNNING: "the answer is late",
    StepStatus.UNDOING: "the answer to its compensation is late",
    StepStatus.RETRYING: "next attempt",
    StepStatus.UNDO_RETRYING: "next attempt of its compensation",
    StepStatus.WAITING: "it waits no longer",
}


@dataclass(frozen=True, slots=True)
class Timer:
    """One thing that is due.

    Attributes:
        saga: the instance whose it is.
        step: the step that it concerns; None for the saga's own deadline.
        what: what it is, in words.
        due_at: when, on the database's clock.
    """

    saga: Instance
    step: str | None
    what: str
    due_at: datetime


def timers_of(instance: Instance) -> list[Timer]:
    """Return all timers of an instance, the earliest first."""
    if instance.due_at is None:
        return []
    found = [
        Timer(instance, name, _WHAT.get(at.status, at.status.value), at.due_at)
        for name, at in instance.steps.items()
        if at.due_at is not None
    ]
    if instance.deadline is not None:
        found.append(Timer(instance, None, "the saga turns back", instance.deadline))
    return sorted(found, key=lambda timer: timer.due_at)


async def find_timers(store: Store, query: Query, *, before: datetime | None = None, limit: int = 50) -> list[Timer]:
    """Return the timers of the sagas that are meant, the earliest first, `limit` at most.

    A query for a step means the timers of that step. With `before`, those that are due earlier than that.
    """
    found: list[Timer] = []
    last: tuple[datetime, UUID] | None = None
    while page := await store.due(query, after=last, limit=_PAGE):
        found += _wanted(page, query.step, before)
        horizon, last_id = page[-1].due_at, page[-1].id
        if horizon is None or (before is not None and horizon >= before):
            break
        # Whoever comes later has no timer before this.
        if sum(timer.due_at <= horizon for timer in found) >= limit:
            break
        last = horizon, last_id
    for instance, name, at in await store.due_items(query, before=before, limit=limit):
        found += _wanted([replace(instance, steps={name: at}, due_at=at.due_at, deadline=None)], name, before)
    return sorted(found, key=lambda timer: timer.due_at)[:limit]


def _wanted(page: Sequence[Instance], step: str | None, before: datetime | None) -> Iterator[Timer]:
    for instance in page:
        for timer in timers_of(instance):
            if (step is None or timer.step == step) and (before is None or timer.due_at < before):
                yield timer
