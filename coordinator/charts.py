"""A saga as a flowchart: Mermaid text, for a definition or for one instance with what was done and undone. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from coordinator.chart_words import Words
from coordinator.definition import SagaDefinition
from coordinator.flow import Each, Leaf, Node, Parallel, Sequence, When, nodes
from coordinator.instance import Instance, Status
from coordinator.progress import Mark, Progress
from coordinator.steps import Ending, Step
from coordinator.waits import Delay, Wait

_STYLES = {
    Mark.DONE: "fill:#d7f5dd,stroke:#1a7f37,color:#0b3d1a",
    Mark.RUNNING: "fill:#dbeafe,stroke:#1d4ed8,color:#0b2a6b",
    Mark.LEFT: "fill:#ffffff,stroke:#57606a,color:#24292f",
    Mark.FAILED: "fill:#fde2e1,stroke:#b42318,color:#5f120b",
    Mark.NOT_KNOWN: "fill:#fff3cd,stroke:#9a6700,color:#4d3300",
    Mark.BEING_UNDONE: "fill:#ffe8d1,stroke:#bc4c00,color:#5c2500",
    Mark.UNDONE: "fill:#ececf1,stroke:#57606a,color:#24292f",
    Mark.CALLED_OFF: "fill:#ececf1,stroke:#57606a,color:#24292f",
    Mark.NOT_TAKEN: "fill:#f6f8fa,stroke:#8c959f,color:#6e7781,stroke-dasharray:4 3",
}
_SHAPES = {Step: ('["', '"]'), Each: ('[["', '"]]'), Wait: ('>"', '"]'), Delay: ('>"', '"]')}
_PIVOT = "stroke-width:4px"
_GREY = "stroke:#8c959f,stroke-dasharray:4 3"
_MOST = 120  # characters of a text from outside
_ESCAPED = {character: f"#{ord(character)};" for character in '"#&<>`\\'}


@dataclass(frozen=True, slots=True)
class _End:
    """An arrow that leaves what is drawn: from where, what is written on it, and whether that way was not taken."""

    of: str
    label: str = ""
    is_grey: bool = False


def mermaid(definition: SagaDefinition, instance: Instance | None = None, others: Iterable[SagaDefinition] = ()) -> str:
    """Return a Mermaid flowchart of a saga: steps downwards, their compensations beside them, upwards.

    With an `instance`, each part has the colour of where it stands, and what was not taken is dashed. Steps whose
    commands start one of the `others` name it.
    """
    return _Drawing(definition, instance, others).draw()


class _Drawing:
    def __init__(self, definition: SagaDefinition, instance: Instance | None, others: Iterable[SagaDefinition]) -> None:
        self._definition = definition
        self._instance = instance
        self._words = Words(definition, instance, others)
        self._progress = self._words.progress
        self._lines = ["flowchart TD"]
        self._classes: dict[Mark, list[str]] = {}
        self._edges = 0
        self._meetings = 0
        self._grey: list[int] = []
        numbered = (node for node in nodes(definition.flow) if isinstance(node, Parallel))
        self._joins = {node: f"join_{number}" for number, node in enumerate(numbered, 1)}

    def draw(self) -> str:
        instance, definition = self._instance, self._definition
        name = f"saga {definition.name} version {definition.version}"
        about = name if instance is None else f"{name}: {instance.key[:_MOST]}"
        self._node("started", '(["', [self._words.started_by, about, *self._words.about], '"])')
        ends = self._forth(definition.flow, [_End("started")])
        self._end(Status.COMPLETED, definition.on_completed)
        self._join(ends, "completed")
        if any(step.undo for step in definition.steps) or (instance and instance.status is Status.COMPENSATED):
            self._end(Status.COMPENSATED, definition.on_compensated)
        self._back(definition.flow, [])
        if self._progress is not None and self._progress.instance.status is Status.NEEDS_ATTENTION:
            self._call_a_person(self._progress)
        return "\n".join([*self._lines, *self._styles()]) + "\n"

    def _forth(self, node: Node, before: list[_End]) -> list[_End]:
        """Draw the way through `node` that begins where `before` ends; return where it ends."""
        match node:
            case Sequence(parts):
                for part in parts:
                    before = self._forth(part, before)
                return before
            case Parallel():
                return self._side_by_side(node, before)
            case When():
                return self._either_way(node, before)
        left, right = _SHAPES[type(node)]
        said = self._words.of(node)
        if self._instance is not None and (at := self._instance.steps.get(node.name)) is not None:
            said = [at.status.value.replace("_", " "), *said]
        name = f"do_{node.name}"
        self._node(name, left, [node.name, *said], right)
        mark = self._progress.of(node) if self._progress else None
        self._mark(name, mark)
        is_passed = mark is Mark.NOT_TAKEN
        self._join([replace(end, is_grey=end.is_grey or is_passed) for end in before], name)
        return [_End(name, is_grey=is_passed)]

    def _side_by_side(self, node: Parallel, before: list[_End]) -> list[_End]:
        branches = self._definition.branches.get(node, ())
        ends = []
        for number, part in enumerate(node.parts):
            into = before
            if branches:
                said = branches[number].name
                if self._progress is not None:
                    said += f": {self._progress.of_branch(branches[number])}"
                into = [replace(end, label=f"{end.label}, {said}" if end.label else said) for end in before]
            ends += self._forth(part, into)
        name = self._joins[node]
        self._node(name, '{{"', self._words.of_parallel(node), '"}}')
        self._join(ends, name)
        is_passed = all(end.is_grey for end in ends)
        if self._progress is not None and self._progress.done_in(node) >= node.needed:
            self._mark(name, Mark.DONE)
        elif is_passed:
            self._mark(name, Mark.NOT_TAKEN)
        return [_End(name, is_grey=is_passed)]

    def _either_way(self, node: When, before: list[_End]) -> list[_End]:
        name = f"if_{node.condition.name}"
        self._node(name, '{"', [f"{node.condition.name}?"], '"}')
        mark = self._progress.of_choice(node) if self._progress else None
        self._mark(name, mark)
        is_passed = mark is Mark.NOT_TAKEN
        self._join([replace(end, is_grey=end.is_grey or is_passed) for end in before], name)
        answer = self._words.answer(node)
        yes, no = (_End(name, way, is_passed or answer not in (None, way)) for way in ("yes", "no"))
        ends = self._forth(node.then, [yes])
        return [*ends, no] if node.otherwise is None else [*ends, *self._forth(node.otherwise, [no])]

    def _back(self, node: Node, before: list[str]) -> list[str]:
        """Draw how `node` is undone, up to the compensations `before` it; return the first ones to go."""
        match node:
            case Sequence(parts, side_by_side=False):
                for part in parts:
                    before = self._back(part, before)
                return before
            case Sequence(parts) | Parallel(parts):
                before = self._meet(node, before)
                ends = [end for part in parts for end in self._back(part, before)]
                return list(dict.fromkeys(ends))
            case When(parts=parts, otherwise=otherwise):
                ends = [end for part in parts for end in self._back(part, before)]
                return list(dict.fromkeys(ends if otherwise is not None else [*ends, *before]))
        step = self._definition.step_of(node.name)
        if step is None or step.undo is None:
            return before
        name = f"undo_{node.name}"
        mark = self._progress.of_undo(node) if self._progress else None
        self._node(name, '[/"', [step.undo.name, *([mark.value] if mark else []), *self._words.of_undo(node)], '"/]')
        self._mark(name, mark)
        self._edge(f"do_{node.name} -. undo .-> {name}")
        for end in before or ["compensated"]:
            self._edge(f"{name} -.-> {end}")
        return [name]

    def _meet(self, node: Node, before: list[str]) -> list[str]:
        """Let several compensations of `node` meet on their way to several others; Mermaid draws 500 arrows at most."""
        steps = (self._definition.step_of(each.name) for each in nodes(node) if isinstance(each, Leaf))
        if len(before) < 2 or sum(step is not None and step.undo is not None for step in steps) < 2:  # noqa: PLR2004
            return before
        self._meetings += 1
        name = f"back_{self._meetings}"
        self._node(name, '{{"', ["all undone"], '"}}')
        for end in before:
            self._edge(f"{name} -.-> {end}")
        return [name]

    def _end(self, status: Status, ending: Ending | None) -> None:
        said = [f"{status.value}: {ending.name}" if ending else status.value]
        if self._instance is not None and self._instance.status is not Status.NEEDS_ATTENTION:
            reason = self._instance.reason if status is Status.COMPENSATED else None
            said += [reason[:_MOST]] if reason else []
        self._node(status.value, '(["', said, '"])')
        self._mark(status.value, self._progress.of_end(status) if self._progress else None)

    def _call_a_person(self, progress: Progress) -> None:
        """Draw that a person must look, why, and because of what."""
        reason = progress.instance.reason
        self._node("needs_attention", '(["', ["needs attention", *([reason[:_MOST]] if reason else [])], '"])')
        self._mark("needs_attention", Mark.FAILED)
        for node in nodes(self._definition.flow):
            if not isinstance(node, Leaf):
                continue
            if progress.of_undo(node) is Mark.FAILED:
                self._edge(f"undo_{node.name} -.-> needs_attention")
            elif progress.is_why_stuck(node):
                self._edge(f"do_{node.name} -.-> needs_attention")

    def _node(self, name: str, left: str, lines: list[str], right: str) -> None:
        self._lines.append(f"    {name}{left}{'<br/>'.join(map(_text, lines))}{right}")

    def _join(self, before: list[_End], after: str) -> None:
        for end in before:
            if end.is_grey:
                self._grey.append(self._edges)
            self._edge(f"{end.of} -->{f'|{_text(end.label)}|' if end.label else ''} {after}")

    def _edge(self, drawn: str) -> None:
        self._lines.append(f"    {drawn}")
        self._edges += 1

    def _mark(self, name: str, mark: Mark | None) -> None:
        if mark is not None:
            self._classes.setdefault(mark, []).append(name)

    def _styles(self) -> list[str]:
        lines = []
        for mark, style in _STYLES.items():
            if names := self._classes.get(mark):
                word = mark.value.replace(" ", "_")
                lines.append(f"    classDef {word} {style}")
                lines += [f"    class {name} {word}" for name in names]
        if pivots := [f"do_{step.name}" for step in self._definition.steps if step.pivot]:
            lines += [f"    classDef pivot {_PIVOT}", *(f"    class {name} pivot" for name in pivots)]
        if self._grey:
            lines.append(f"    linkStyle {','.join(map(str, self._grey))} {_GREY}")
        return lines


def _text(words: str) -> str:
    """Return words as they may stand in a label: nothing in them is taken for Mermaid, HTML or Markdown."""
    return "".join(_ESCAPED.get(each, each) if each.isprintable() else " " for each in words)
