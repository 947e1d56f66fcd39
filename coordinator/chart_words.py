"""What a chart says of the parts of a flow, in phrases: as they are declared, and as they stand. Pure."""

from collections.abc import Iterable, Mapping
from functools import cached_property

from coordinator.definition import SagaDefinition
from coordinator.durations import lasting, moment
from coordinator.fingerprints import structure
from coordinator.flow import Each, Leaf, Node, Parallel, Stragglers, When
from coordinator.instance import Fan, Instance, Status, StepState, StepStatus
from coordinator.progress import Mark, Progress
from coordinator.steps import Deadline, Step
from coordinator.waits import Delay, Wait

_STRAGGLERS = {
    Stragglers.UNDO: "the others are then undone",
    Stragglers.KEEP: "the others go on beside what follows",
    Stragglers.WAIT: "the others are waited for",
}


class Words:
    """What is said of the parts of one saga.

    Args:
        definition: the saga.
        instance: one run of it.
        others: sagas of the same application: those that a step's command starts are named.
    """

    def __init__(
        self, definition: SagaDefinition, instance: Instance | None = None, others: Iterable[SagaDefinition] = ()
    ) -> None:
        self.definition = definition
        self.instance = instance
        self.progress = None if instance is None else Progress(definition, instance)
        starts = [(start.event.message_type, other.name) for other in others for start in other.starts]
        self._sagas: Mapping[str, str] = dict(starts)

    @property
    def started_by(self) -> str:
        """The messages that start it."""
        return " or ".join(start.event.message_type for start in self.definition.starts)

    @property
    def about(self) -> list[str]:
        """Phrases on the saga as a whole: the key that it holds, and what becomes of it if it is not done in time."""
        lock, found = self.definition.lock, []
        if lock is not None and self.instance is None:
            found.append(f"one at a time of each {lock}")
        elif lock is not None and self.instance is not None and self.instance.status is Status.WAITING:
            found.append(f"waits until no other saga holds its {lock}")
        if self.instance is not None:
            at = self.instance.deadline
            return found if at is None else [*found, f"turns back at {moment(at)} unless it is done"]
        if self.definition.deadline is None:
            return found
        pivot = ", or past its pivot" if any(step.pivot for step in self.definition.steps) else ""
        return [*found, f"turns back unless it is done within {lasting(self.definition.deadline)}{pivot}"]

    def of(self, leaf: Leaf) -> list[str]:
        """Return phrases on a part: how it stands once it was begun, how it was declared while it is left to do."""
        at = self.instance.steps.get(leaf.name) if self.instance else None
        if self.progress is not None and self.progress.of(leaf) is Mark.NOT_TAKEN:
            return []
        found = self._declared(leaf) if at is None else self._standing(leaf, at)
        step = self.definition.step_of(leaf.name)
        if step is not None and leaf.name in self._children:
            found.append(f"saga {self._children[leaf.name]}")
        return [*found, "pivot: no way back after it"] if step is not None and step.pivot else found

    def of_undo(self, leaf: Leaf) -> list[str]:
        """Return phrases on the compensation of a part: how it was declared, of an instance how it stands."""
        step = self.definition.step_of(leaf.name)
        if step is None or step.undo is None:
            return []
        at = self.instance.steps.get(leaf.name) if self.instance else None
        if at is not None and (at.undo_attempt or (at.fan and at.fan.unseen is not None)):
            return self._undoing(step, at)
        if self.instance is not None:
            return []
        found = _within(step.undo_deadline)
        return [*found, f"up to {step.undo_retry.attempts} attempts"] if step.undo_retry.attempts > 1 else found

    def of_parallel(self, node: Parallel) -> list[str]:
        """Return phrases on where branches come together."""
        found = [f"{node.needed} of {len(node.parts)} needed" if node.may_fail else f"all {node.needed}"]
        if node.may_fail and node.needed == 1:
            found = [f"any of {len(node.parts)}"]
        if node.may_fail:
            found.append(_STRAGGLERS[node.stragglers])
        return [*found, f"{self.progress.done_in(node)} done"] if self.progress else found

    def answer(self, node: When) -> str | None:
        """Return what a condition has said."""
        holds = self.progress.holds(node) if self.progress else None
        return None if holds is None else "yes" if holds else "no"

    @cached_property
    def _children(self) -> dict[str, str]:
        """The sagas that steps start, by the name of the step."""
        parts = structure(self.definition)["steps"] if self._sagas else {}
        sent = {name: str(part.get("command") or "").split(" | ") for name, part in parts.items()}
        found = {name: [self._sagas[each] for each in types if each in self._sagas] for name, types in sent.items()}
        return {name: " or ".join(dict.fromkeys(sagas)) for name, sagas in found.items() if sagas}

    @cached_property
    def _past_pivot(self) -> frozenset[str]:
        names: set[str] = set()
        _note_past_pivot(self.definition.flow, names, past=False)
        return frozenset(names)

    def _declared(self, leaf: Leaf) -> list[str]:
        match leaf:
            case Wait():
                return self._waiting_for(leaf)
            case Delay():
                return ["lets time pass"]
            case Each():
                on_failure = "one that fails is left out" if leaf.collect else "one that fails undoes all"
                each = f"for each of {leaf.items.name}, {leaf.limit} at a time"
                return [each, *_within(leaf.step.deadline), on_failure]
        past = [f"up to {leaf.recovery.attempts} attempts"] if leaf.pivot or leaf.name in self._past_pivot else []
        return [*_within(leaf.deadline), *past]

    def _waiting_for(self, wait: Wait) -> list[str]:
        found = [f"waits for {wait.outcome.message_type}"]
        back = self._if_not(wait)
        if wait.on_declined is not None:
            found.append(f"{wait.on_declined.outcome.message_type} says no: {back}")
        if wait.timeout is None:
            return [*found, "as long as it takes"]
        return [*found, f"within {lasting(wait.timeout)}, else {self._at_deadline(wait)}"]

    def _at_deadline(self, wait: Wait) -> str:
        return f"goes on ({wait.on_expired.name})" if wait.on_expired is not None else self._if_not(wait)

    def _if_not(self, leaf: Leaf) -> str:
        """What follows where a part is not done."""
        if self.definition.around(leaf.name):
            return "its branch turns back"
        return "a person must look" if leaf.name in self._past_pivot else "turns back"

    def _standing(self, leaf: Leaf, at: StepState) -> list[str]:
        found = []
        if at.attempt > 1 or at.status is StepStatus.RETRYING:
            step = self.definition.step_of(leaf.name)
            found.append(_attempt(at.attempt, step.recovery.attempts if step else 1))
        if at.fan is not None:
            return [*found, *_counts(at.fan)]
        match at.status:
            case StepStatus.WAITING if isinstance(leaf, Wait):
                until = self._due(at, "until")
                found += [f"for {' or '.join(each.message_type for each in leaf.events)}"]
                found += [f"{each}, then {self._at_deadline(leaf)}" for each in until] or ["as long as it takes"]
            case StepStatus.WAITING:
                found += self._due(at, "until")
            case StepStatus.RUNNING:
                found += [f"sent {at.sends} times"] if at.sends > 1 else []
                found += self._due(at, "answer by")
            case StepStatus.RETRYING:
                found += self._due(at, "next attempt at")
            case StepStatus.EXPIRED:
                found += ["nothing came in time"]
        return found

    def _undoing(self, step: Step, at: StepState) -> list[str]:
        if at.fan is not None:
            return [f"{at.fan.unseen} to go"] if at.fan.unseen else []
        most = step.undo_retry.attempts
        found = [_attempt(at.undo_attempt, most)] if at.undo_attempt > 1 or most > 1 else []
        match at.status:
            case StepStatus.UNDOING:
                found += [f"sent {at.sends} times"] if at.sends > 1 else []
                found += self._due(at, "answer by")
            case StepStatus.UNDO_RETRYING:
                found += self._due(at, "next attempt at")
        return found

    def _due(self, at: StepState, what: str) -> list[str]:
        is_counted = self.instance is not None and self.instance.status.in_flight and at.due_at is not None
        return [f"{what} {moment(at.due_at)}"] if is_counted and at.due_at is not None else []


def _within(deadline: Deadline) -> list[str]:
    again = f", sent up to {deadline.resends + 1} times" if deadline.resends else ""
    return [f"within {lasting(deadline.timeout)}{again}"]


def _attempt(number: int, most: int) -> str:
    """Operators may ask for more attempts than are declared."""
    return f"attempt {number} of {most}" if number <= most else f"attempt {number}"


def _counts(fan: Fan) -> list[str]:
    counts = ((fan.pending, "under way"), (fan.failed, "failed"), (fan.stuck, "could not be undone"))
    return [f"{fan.begun} of {fan.total} begun", *(f"{number} {what}" for number, what in counts if number)]


def _note_past_pivot(node: Node, names: set[str], *, past: bool) -> bool:
    """Note the parts of `node` that come after a pivot for certain; say whether what follows does."""
    if isinstance(node, Leaf):
        if past:
            names.add(node.name)
        return past or (isinstance(node, Step) and node.pivot)
    if isinstance(node, When):
        ways = [_note_past_pivot(part, names, past=past) for part in node.parts]
        return past or (node.otherwise is not None and all(ways))
    for part in node.parts:  # no pivot stands in a parallel part
        past = _note_past_pivot(part, names, past=past)
    return past
