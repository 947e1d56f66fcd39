"""What must hold of a saga and its history; docs/history.md says what the numbers stand for. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic_core import from_json

from coordinator.instance import Instance, Status, StepState
from events.envelope import Direction

LATE = timedelta(minutes=10)  # after which a deadline that nobody acts on is a finding
CLOCKS = timedelta(seconds=1)  # by which the clocks of two processes may differ

# What may follow what; a status may always follow itself, and anything what a person has looked at.
FOLLOWS = {
    Status.WAITING: tuple(Status),
    Status.RUNNING: (Status.COMPENSATING, Status.COMPLETED, Status.COMPENSATED, Status.NEEDS_ATTENTION),
    Status.COMPENSATING: (Status.COMPENSATED, Status.NEEDS_ATTENTION),
    Status.COMPLETED: tuple(Status),
    Status.COMPENSATED: (Status.COMPENSATING, Status.NEEDS_ATTENTION),
    Status.NEEDS_ATTENTION: tuple(Status),
}
WAKING = ("late_success", "late_failure", "recalled", "resolve")  # only these go on with what had ended


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that does not hold.

    Attributes:
        saga_id: of this saga.
        invariant: its number.
        detail: what is wrong, in words.
    """

    saga_id: UUID
    invariant: str
    detail: str


@dataclass(slots=True)
class Retold:
    """A saga as its history tells it.

    Attributes:
        state, steps: as they are after the rows so far.
        undone: steps whose compensation was sent, with the ids of these commands.
        done: steps whose command was sent, with the ids of these.
    """

    state: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, StepState] = field(default_factory=dict)
    undone: dict[str, list[UUID]] = field(default_factory=dict)
    done: dict[str, list[UUID]] = field(default_factory=dict)

    def take(self, row: Any) -> Iterator[tuple[str, str]]:
        """Take one row of history; return what does not hold, with the number of the invariant."""
        if row.kind == "deadline" and row.step is not None:
            at = self.steps.get(row.step)
            if at is not None and at.due_at is None:
                yield "I12", f"revision {row.revision}: {row.step} had no deadline that could have passed"
            elif at is not None and at.due_at is not None and at.due_at > row.at:
                yield "I12", f"revision {row.revision}: {row.step} was given up on before its deadline"
        before = dict(self.steps)
        if row.kind == "migrated":  # it holds all of the state and the steps, which may have other names
            self.state = {}
            self.steps = {name: at for name, at in self.steps.items() if "[" in name}
        self.state.update(row.change.get("state", {}))
        self.steps.update({name: StepState.from_json(at) for name, at in row.change.get("steps", {}).items()})
        for sent in row.sent:
            if sent.get("direction") == Direction.UNDO:
                if sent["step"] not in before:
                    yield "I3", f"revision {row.revision}: {sent['step']} was undone, and never done"
                self.undone.setdefault(sent["step"], []).append(UUID(sent["id"]))
            elif sent.get("direction") == Direction.DO:
                if sent["step"] in self.undone:
                    yield "I4", f"revision {row.revision}: {sent['step']} was sent after it was undone"
                self.done.setdefault(sent["step"], []).append(UUID(sent["id"]))


def check_saga(instance: Instance, rows: Sequence[Any], now: datetime) -> tuple[list[Finding], Retold]:
    """Check one saga against its history, oldest row first.

    Args:
        instance: as it is stored.
        rows: its rows of history.
        now: the database's time.

    Returns:
        What does not hold, and the saga as its history tells it.
    """
    retold = Retold()
    found = [each for row in rows for each in retold.take(row)]
    found += _differences(instance, retold)
    found += _hanging(instance, now)
    if instance.status is Status.COMPENSATED:
        left = [name for name, at in instance.steps.items() if at.status.to_undo and at.command]
        found += [("I3", f"it is compensated, and {name} was not undone") for name in left]
    return [Finding(instance.id, invariant, detail) for invariant, detail in found], retold


def _differences(instance: Instance, retold: Retold) -> Iterator[tuple[str, str]]:
    """Compare what is stored with what the history tells."""
    names = {*retold.state, *instance.state}
    if differing := [name for name in names if not same(retold.state.get(name), instance.state.get(name))]:
        yield "I9", f"its state is not what its history tells: {', '.join(sorted(differing))}"
    told = {name: at.to_history() for name, at in retold.steps.items() if "[" not in name}
    stored = {name: at.to_history() for name, at in instance.steps.items()}
    if differing := [name for name in {*told, *stored} if not same(told.get(name), stored.get(name))]:
        yield "I9", f"its steps are not what its history tells: {', '.join(sorted(differing))}"


def same(one: Any, other: Any) -> bool:
    """Compare two JSON values: a database may write a large float as an integer, which Python compares exactly."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) != isinstance(other, float) and isinstance(one, int | float):
        return isinstance(other, int | float) and float(one) == float(other)
    return bool(one == other)


def adds_up(document: str) -> bool:
    """Say whether a saga is what the changes of its rows add up to; cheaper than to retell it.

    False is also what cannot be read, or may be right after all: `check_saga` tells.

    Args:
        document: as JSON text a list of its state, its steps, and what each of its rows has changed.
    """
    told_state: dict[str, Any] = {}
    told_steps: dict[str, Any] = {}
    try:
        state, steps, *changes = from_json(document)
        for change in changes:
            told_state.update(change.get("state", {}))
            told_steps.update(change.get("steps", {}))
        told_steps = {name: at for name, at in told_steps.items() if "[" not in name}
        return same(told_state, state) and same(told_steps, steps)
    except (AttributeError, TypeError, ValueError):
        return False


def _hanging(instance: Instance, now: datetime) -> Iterator[tuple[str, str]]:
    """A saga that is not ended waits for something, and somebody looks when that does not come."""
    due = [at.due_at for at in instance.steps.values() if at.due_at is not None]
    if not instance.status.in_flight:
        return
    if instance.due_at is None and not any(at.status.pending for at in instance.steps.values()):
        yield "I1", f"it is {instance.status}, and waits for nothing"
    if due and (instance.due_at is None or instance.due_at > min(due)):
        yield "I1", f"nobody looks at {min(due).isoformat()}, when it gives up on an answer"
    if instance.due_at is not None and instance.due_at < now - LATE:
        yield "I1", f"its deadline has passed at {instance.due_at.isoformat()}, and nobody has acted"


def overtaken(
    saga_id: UUID, retold: Retold, handled: Mapping[UUID, datetime], barred: frozenset[UUID]
) -> Iterator[Finding]:
    """Say which steps took effect after they were undone.

    Args:
        saga_id: the saga.
        retold: its history.
        handled: when commands were handled, as far as that is known here.
        barred: those that were refused.
    """
    for step, undos in retold.undone.items():
        undone_at = [handled[each] for each in undos if each in handled]
        late = [
            each
            for each in retold.done.get(step, ())
            if undone_at and each in handled and each not in barred and handled[each] > max(undone_at) + CLOCKS
        ]
        if late:
            yield Finding(saga_id, "I4", f"{step} was done after it was undone")
