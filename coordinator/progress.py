"""Where the parts of an instance stand, for people: what is done, under way, left to do or undone. Pure."""

from enum import StrEnum

from coordinator.definition import Branch, SagaDefinition
from coordinator.flow import Each, Leaf, Node, Parallel, Sequence, When, nodes
from coordinator.instance import Instance, Status, StepStatus
from events.errors import ConfigurationError


class Mark(StrEnum):
    """Where a part stands, in a word."""

    DONE = "done"
    RUNNING = "running"
    LEFT = "left"
    FAILED = "failed"
    NOT_KNOWN = "not known"
    BEING_UNDONE = "being undone"
    UNDONE = "undone"
    CALLED_OFF = "called off"
    NOT_TAKEN = "not taken"


_MARKS = {
    StepStatus.RUNNING: Mark.RUNNING,
    StepStatus.RETRYING: Mark.RUNNING,
    StepStatus.WAITING: Mark.RUNNING,
    StepStatus.SUCCEEDED: Mark.DONE,
    StepStatus.EXPIRED: Mark.DONE,
    StepStatus.DECLINED: Mark.FAILED,
    StepStatus.UNKNOWN: Mark.NOT_KNOWN,
    StepStatus.UNDOING: Mark.BEING_UNDONE,
    StepStatus.UNDO_RETRYING: Mark.BEING_UNDONE,
    StepStatus.UNDONE: Mark.UNDONE,
    StepStatus.UNDO_FAILED: Mark.FAILED,
    StepStatus.CALLED_OFF: Mark.CALLED_OFF,
}
_UNDO_MARKS = {
    StepStatus.UNDOING: Mark.RUNNING,
    StepStatus.UNDO_RETRYING: Mark.RUNNING,
    StepStatus.UNDONE: Mark.DONE,
    StepStatus.UNDO_FAILED: Mark.FAILED,
}
_GOING_BACK = (StepStatus.UNDOING, StepStatus.UNDONE)


class Progress:
    """How far an instance has come in the flow of its definition.

    Raises:
        ConfigurationError: it is archived, so that nobody knows here.
    """

    def __init__(self, definition: SagaDefinition, instance: Instance) -> None:
        if instance.status is Status.ARCHIVED:
            raise ConfigurationError(
                f"saga {instance.key} is archived: how far it came is in the file of `coordinator sagas archive`"
            )
        self.definition = definition
        self.instance = instance
        self._steps = instance.steps
        self._passed = frozenset(self._passed_by(definition.flow))

    def of(self, leaf: Leaf) -> Mark:
        """Return where a part with a state stands."""
        at = self._steps.get(leaf.name)
        if at is None:
            return self._not_begun(leaf)
        if isinstance(leaf, Each) and leaf.step.undo is None and at.status in _GOING_BACK:
            return Mark.CALLED_OFF  # its items that were under way are over, and nothing undoes them
        if at.fan is not None and at.fan.stuck and not at.status.pending:
            return Mark.FAILED
        return _MARKS[at.status]

    def of_undo(self, leaf: Leaf) -> Mark | None:
        """Return where the compensation of a part stands; None if it has none, or nothing is to be undone."""
        step, at = self.definition.step_of(leaf.name), self._steps.get(leaf.name)
        if step is None or step.undo is None or at is None:
            return None
        if at.status is StepStatus.UNDONE and not at.undo_attempt and at.fan is None:
            return Mark.NOT_TAKEN  # somebody has undone it by hand
        if at.status in _UNDO_MARKS:
            return _UNDO_MARKS[at.status]
        to_undo = at.status.pending or at.status.to_undo
        return Mark.LEFT if to_undo and self.goes_back(leaf) else None

    def of_branch(self, branch: Branch) -> Mark:
        """Return where a branch stands that may fail without turning the saga back."""
        leaves = [node for node in nodes(branch.part) if isinstance(node, Leaf)]
        at = self._steps.get(branch.name)
        if at is None:
            return self._not_begun(leaves[0])
        if at.status not in _GOING_BACK and not self.instance.turned_back:
            return _MARKS[at.status]
        states = [self._steps[leaf.name].status for leaf in leaves if leaf.name in self._steps]
        if StepStatus.UNDO_FAILED in states:
            return Mark.FAILED
        is_left = any(status.pending for status in states) or any(self.of_undo(leaf) is Mark.LEFT for leaf in leaves)
        if is_left:
            return Mark.BEING_UNDONE
        if at.status is StepStatus.UNDONE or StepStatus.UNDONE in states:
            return Mark.UNDONE
        return Mark.DONE if at.status is StepStatus.SUCCEEDED else Mark.CALLED_OFF

    def of_choice(self, node: When) -> Mark:
        """Return whether a condition was asked already."""
        return Mark.DONE if node.condition.name in self._steps else self._not_begun(node)

    def holds(self, node: When) -> bool | None:
        """Return what a condition has said; None if it was not asked."""
        at = self._steps.get(node.condition.name)
        return None if at is None else at.status is StepStatus.TAKEN

    def of_end(self, status: Status) -> Mark:
        """Return whether the saga has ended so, is on its way there, or will not get there."""
        if self.instance.status is status:
            return Mark.DONE
        goes_there = self.instance.turned_back is (status is Status.COMPENSATED)
        return Mark.LEFT if goes_there and not self.instance.status.ended else Mark.NOT_TAKEN

    def done_in(self, node: Parallel) -> int:
        """Return how many branches are done."""
        if node.may_fail:
            states = [self._steps.get(branch.name) for branch in self.definition.branches[node]]
            done = sum(at is not None and at.status is StepStatus.SUCCEEDED for at in states)
            return 0 if self.instance.turned_back else done
        return sum(map(self._is_over, node.parts))

    def goes_back(self, node: Node) -> bool:
        """Say whether the saga is undone, or was, or a branch with `node` in it."""
        branches = (self._steps.get(branch.name) for branch in self._around(node))
        return self.instance.turned_back or any(at is not None and at.status in _GOING_BACK for at in branches)

    def is_why_stuck(self, leaf: Leaf) -> bool:
        """Say whether a person must look because of a part, which has failed where there is no way back."""
        stuck = self.instance.status is Status.NEEDS_ATTENTION and not self.goes_back(leaf)
        return stuck and self.of(leaf) in (Mark.FAILED, Mark.NOT_KNOWN) and self.of_undo(leaf) is not Mark.FAILED

    def _not_begun(self, node: Leaf | When) -> Mark:
        """A part that has no state is left to do, or never will be done."""
        branches = (self._steps.get(branch.name) for branch in self._around(node))
        is_over = any(at is not None and at.status is not StepStatus.RUNNING for at in branches)
        has_ended = self.instance.turned_back or self.instance.status.ended
        return Mark.NOT_TAKEN if has_ended or is_over or _name(node) in self._passed else Mark.LEFT

    def _around(self, node: Node) -> tuple[Branch, ...]:
        leaf = next(each for each in nodes(node) if isinstance(each, Leaf))
        return self.definition.around(leaf.name)

    def _passed_by(self, node: Node) -> list[str]:
        """Return the names of what stands in ways that were not taken."""
        found = []
        for each in nodes(node):
            if isinstance(each, When) and (holds := self.holds(each)) is not None:
                other = each.otherwise if holds else each.then
                names = [] if other is None else [_name(part) for part in nodes(other)]
                found += [name for name in names if name]
        return found

    def _is_over(self, node: Node) -> bool:
        match node:
            case Sequence(parts):
                return all(map(self._is_over, parts))
            case Parallel(needed=needed):
                return self.done_in(node) >= needed
            case When(then=then, otherwise=otherwise):
                holds = self.holds(node)
                taken = then if holds else otherwise
                return holds is not None and (taken is None or self._is_over(taken))
        return node.name in self._steps and self._steps[node.name].status.done


def _name(node: Node) -> str:
    if isinstance(node, When):
        return node.condition.name
    return node.name if isinstance(node, Leaf) else ""
