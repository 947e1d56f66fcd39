"""A saga as plain text: an indented tree of 80 columns, for a definition or for one instance. Pure."""

import textwrap
from collections.abc import Iterable

from coordinator.chart_words import Words
from coordinator.definition import SagaDefinition
from coordinator.flow import Leaf, Node, Parallel, Sequence, When
from coordinator.instance import Instance, Status, StepStatus
from coordinator.progress import Mark

_COLUMNS = 80
_DEEPEST = 40  # columns: what is nested deeper is not indented further
_SIGNS = {
    Mark.DONE: "x",
    Mark.RUNNING: ">",
    Mark.LEFT: " ",
    Mark.FAILED: "!",
    Mark.NOT_KNOWN: "?",
    Mark.BEING_UNDONE: "<",
    Mark.UNDONE: "u",
    Mark.CALLED_OFF: "~",
    Mark.NOT_TAKEN: "-",
}
_SAID = (StepStatus.DECLINED, StepStatus.EXPIRED, StepStatus.RETRYING, StepStatus.WAITING)  # more than the sign says


def text_chart(
    definition: SagaDefinition, instance: Instance | None = None, others: Iterable[SagaDefinition] = ()
) -> str:
    """Return a chart of a saga as plain text: one part a line, its compensation below it.

    With an `instance`, a sign in front of each part says where it stands; the signs are explained at the end. Steps
    whose commands start one of the `others` name it.
    """
    return _Text(definition, instance, others).write()


class _Text:
    def __init__(self, definition: SagaDefinition, instance: Instance | None, others: Iterable[SagaDefinition]) -> None:
        self._definition = definition
        self._instance = instance
        self._words = Words(definition, instance, others)
        self._progress = self._words.progress
        self._lines: list[str] = []
        self._used: set[Mark] = set()

    def write(self) -> str:
        definition, instance = self._definition, self._instance
        head = f"saga {definition.name} version {definition.version}"
        if instance is None:
            self._say(0, [head])
        else:
            self._say(0, [f"{head}, {instance.key}: {instance.status.value.replace('_', ' ')}"])
        if instance is not None and instance.reason:
            self._say(2, [f"because {instance.reason}"])
        for each in self._words.about:
            self._say(2, [each])
        self._lines.append("")
        self._row(0, f"on {self._words.started_by}", [], Mark.DONE)
        self._part(definition.flow, 0)
        self._end(Status.COMPLETED, definition.on_completed.name if definition.on_completed else None)
        self._end(Status.COMPENSATED, definition.on_compensated.name if definition.on_compensated else None)
        if instance is not None:
            self._lines.append("")
            self._legend()
        return "\n".join(self._lines) + "\n"

    def _part(self, node: Node, depth: int, bullet: str = "") -> None:
        """Write `node`, the first line of it after `bullet`, as one branch of several."""
        match node:
            case Sequence(parts, side_by_side):
                if side_by_side:
                    self._row(depth, f"{bullet}one after the other, undone side by side", [], None)
                    depth, bullet = depth + 1 + bool(bullet), ""
                for part in parts:
                    self._part(part, depth, bullet)
                    depth, bullet = depth + bool(bullet), ""
            case Parallel():
                self._branches(node, depth, bullet)
            case When():
                self._choice(node, depth, bullet)
            case _:
                self._leaf(node, depth, bullet)

    def _branches(self, node: Parallel, depth: int, bullet: str) -> None:
        self._row(depth, f"{bullet}side by side", self._words.of_parallel(node), None)
        depth += bool(bullet)
        branches = self._definition.branches.get(node, ())
        for number, part in enumerate(node.parts):
            if branches:
                mark = self._progress.of_branch(branches[number]) if self._progress else None
                self._row(depth + 1, f"- {branches[number].name}", [], mark)
                self._part(part, depth + 2)
            else:
                self._part(part, depth + 1, "- ")

    def _choice(self, node: When, depth: int, bullet: str) -> None:
        mark = self._progress.of_choice(node) if self._progress else None
        answer = self._words.answer(node)
        self._row(depth, f"{bullet}if {node.condition.name}", [answer] if answer else [], mark)
        depth += bool(bullet)
        self._part(node.then, depth + 1)
        if node.otherwise is not None:
            self._row(depth, "else", [], None)
            self._part(node.otherwise, depth + 1)

    def _leaf(self, node: Leaf, depth: int, bullet: str) -> None:
        at = self._instance.steps.get(node.name) if self._instance else None
        said = [at.status.value] if at is not None and at.status in _SAID else []
        mark = self._progress.of(node) if self._progress else None
        self._row(depth, f"{bullet}{node.name}", [*said, *self._words.of(node)], mark)
        step = self._definition.step_of(node.name)
        if step is not None and step.undo is not None:
            mark = self._progress.of_undo(node) if self._progress else None
            self._row(depth + 1 + bool(bullet), f"undo: {step.undo.name}", self._words.of_undo(node), mark)

    def _end(self, status: Status, announced_by: str | None) -> None:
        mark = self._progress.of_end(status) if self._progress else None
        self._row(0, status.value, [announced_by] if announced_by else [], mark)

    def _legend(self) -> None:
        line = ""
        for mark, sign in _SIGNS.items():
            each = f"[{sign}] {mark.value}"
            if mark in self._used and len(line) + len(each) + 2 > _COLUMNS:
                self._lines.append(line)
                line = each
            elif mark in self._used:
                line = f"{line}  {each}" if line else each
        self._lines.append(line)

    def _row(self, depth: int, name: str, said: list[str], mark: Mark | None) -> None:
        sign = ""
        if self._instance is not None:
            sign = "    " if mark is None else f"[{_SIGNS[mark]}] "
            self._used |= set() if mark is None else {mark}
        self._say(min(2 * depth, _DEEPEST), [name, *said], sign)

    def _say(self, indent: int, said: list[str], sign: str = "") -> None:
        """Write a line: a name, and phrases on it; what has no room goes below, further in."""
        name, *rest = map(_plain, said)
        line = f"{name}: {'; '.join(rest)}" if rest else name
        first, more = sign + " " * indent, " " * (len(sign) + indent + 4)
        self._lines += textwrap.wrap(
            line, _COLUMNS, initial_indent=first, subsequent_indent=more, break_on_hyphens=False
        )


def _plain(words: str) -> str:
    """Return a text from outside in one line, without what would steer the terminal."""
    return "".join(each if each.isprintable() else " " for each in words)
