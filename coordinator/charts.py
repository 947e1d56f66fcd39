"""A saga as a flowchart: Mermaid text, for a definition or for one instance with what was done and undone."""

from coordinator.definition import SagaDefinition
from coordinator.flow import Each, Leaf, Node, Parallel, Sequence, When, nodes
from coordinator.instance import Instance, Status, StepStatus
from coordinator.waits import Delay, Wait

_CLASSES = {
    StepStatus.RUNNING: "running",
    StepStatus.SUCCEEDED: "done",
    StepStatus.DECLINED: "refused",
    StepStatus.UNKNOWN: "unknown",
    StepStatus.RETRYING: "running",
    StepStatus.UNDO_RETRYING: "running",
    StepStatus.UNDOING: "running",
    StepStatus.UNDONE: "undone",
    StepStatus.UNDO_FAILED: "refused",
    StepStatus.WAITING: "running",
    StepStatus.EXPIRED: "unknown",
    StepStatus.CALLED_OFF: "undone",
}
Ends = list[tuple[str, str]]  # names of what is drawn, and what to write on the arrow that leaves it
_STYLES = (
    "classDef done fill:#d7f5dd,stroke:#1a7f37,color:#0b3d1a",
    "classDef running fill:#dbeafe,stroke:#1d4ed8,color:#0b2a6b",
    "classDef refused fill:#fde2e1,stroke:#b42318,color:#5f120b",
    "classDef unknown fill:#fff3cd,stroke:#9a6700,color:#4d3300",
    "classDef undone fill:#ececf1,stroke:#57606a,color:#24292f",
)


def mermaid(definition: SagaDefinition, instance: Instance | None = None) -> str:
    """Return a Mermaid flowchart of a saga: steps downwards, their compensations beside them, upwards.

    With an `instance`, each part has the colour of where it stands.
    """
    lines = ["flowchart TD", f'    started(["{_text(" or ".join(s.event.message_type for s in definition.starts))}"])']
    ends = _forth(definition.flow, [("started", "")], lines, instance)
    lines.append('    completed(["completed"])')
    lines += _edges(ends, "completed")
    _back(definition.flow, [], lines)
    return "\n".join([*lines, *_colours(definition, instance)]) + "\n"


def _forth(node: Node, before: Ends, lines: list[str], instance: Instance | None) -> Ends:
    """Draw the way through `node` that begins where `before` ends; return where it ends."""
    match node:
        case Sequence(parts):
            for part in parts:
                before = _forth(part, before, lines, instance)
            return before
        case Parallel(parts):
            return [end for part in parts for end in _forth(part, before, lines, instance)]
        case When(condition, then, otherwise):
            lines.append(f'    {condition.name}{{"{_text(condition.name)}?"}}')
            lines += _edges(before, condition.name)
            ends = _forth(then, [(condition.name, "yes")], lines, instance)
            if otherwise is None:
                return [*ends, (condition.name, "no")]
            return ends + _forth(otherwise, [(condition.name, "no")], lines, instance)
    lines.append(f'    {node.name}["{_label(node, instance)}"]')
    lines += _edges(before, node.name)
    return [(node.name, "")]


def _edges(before: Ends, after: str) -> list[str]:
    return [f"    {end} -->{f'|{label}|' if label else ''} {after}" for end, label in before]


def _back(node: Node, before: list[str], lines: list[str]) -> list[str]:
    """Draw how `node` is undone, up to the compensations `before` it; return the first ones to go."""
    match node:
        case Sequence(parts):
            for part in parts:
                before = _back(part, before, lines)
            return before
        case Parallel(parts):
            return list(dict.fromkeys(end for part in parts for end in _back(part, before, lines)))
        case When(parts=parts, otherwise=otherwise):
            ends = [end for part in parts for end in _back(part, before, lines)]
            return list(dict.fromkeys(ends if otherwise is not None else [*ends, *before]))
    step = node.step if isinstance(node, Each) else node
    if isinstance(step, Wait | Delay) or step.undo is None:
        return before
    undo, compensated = f"undo_{node.name}", '    compensated(["compensated"])'
    lines.append(f'    {undo}[/"{_text(step.undo.name)}"/]')
    lines.append(f"    {node.name} -. undo .-> {undo}")
    if not before and compensated not in lines:
        lines.append(compensated)
    lines += [f"    {undo} -.-> {end}" for end in before or ["compensated"]]
    return [undo]


def _label(node: Leaf, instance: Instance | None) -> str:
    at = instance.steps.get(node.name) if instance else None
    if at is not None:
        counted = f" ({at.fan.begun} of {at.fan.total} begun)" if at.fan else ""
        return _text(f"{node.name}<br/>{at.status.value}{counted}")
    match node:
        case Wait():
            within = "" if node.timeout is None else f"<br/>within {node.timeout:g} s"
            return _text(f"{node.name}<br/>waits for {' or '.join(each.message_type for each in node.events)}{within}")
        case Delay():
            return _text(f"{node.name}<br/>waits")
        case Each():
            each = f"for each of {node.items.name}<br/>{node.limit} at a time"
            return _text(f"{node.name}<br/>{each}, within {node.step.deadline.timeout:g} s")
    return _text(f"{node.name}<br/>within {node.deadline.timeout:g} s")


def _colours(definition: SagaDefinition, instance: Instance | None) -> list[str]:
    if instance is None:
        return []
    lines = [f"    {style}" for style in _STYLES]
    for node in nodes(definition.flow):
        if isinstance(node, When) and node.condition.name in instance.steps:
            lines.append(f"    class {node.condition.name} done")
        if not isinstance(node, Leaf) or (at := instance.steps.get(node.name)) is None:
            continue
        lines.append(f"    class {node.name} {_CLASSES[at.status]}")
        step = definition.step_of(node.name)
        if step is not None and step.undo is not None and (at.undo_attempt or (at.fan and at.fan.unseen is not None)):
            undone = {StepStatus.UNDONE: "done", StepStatus.UNDO_FAILED: "refused"}.get(at.status, "running")
            lines.append(f"    class undo_{node.name} {undone}")
    if instance.status in (Status.COMPLETED, Status.COMPENSATED):
        ends = any(step.undo for step in definition.steps) or instance.status is Status.COMPLETED
        lines += [f"    class {instance.status.value} done"] if ends else []
    return lines


def _text(words: str) -> str:
    return words.replace('"', "#quot;")
