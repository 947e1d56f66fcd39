"""A saga as a flowchart: Mermaid text, for a definition or for one instance with what was done and undone."""

from coordinator.definition import SagaDefinition, Step
from coordinator.instance import Instance, Status, StepStatus

_CLASSES = {
    StepStatus.RUNNING: "running",
    StepStatus.SUCCEEDED: "done",
    StepStatus.DECLINED: "refused",
    StepStatus.UNKNOWN: "unknown",
    StepStatus.UNDOING: "running",
    StepStatus.UNDONE: "undone",
    StepStatus.UNDO_FAILED: "refused",
}
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
    previous = "started"
    for step in definition.steps:
        lines.append(f'    {step.name}["{_label(step, instance)}"]')
        lines.append(f"    {previous} --> {step.name}")
        previous = step.name
    lines += ['    completed(["completed"])', f"    {previous} --> completed"]
    back = None
    for step in definition.steps:
        if step.undo is None:
            continue
        lines.append(f'    undo_{step.name}[/"{_text(step.undo.name)}"/]')
        lines.append(f"    {step.name} -. undo .-> undo_{step.name}")
        if back is not None:
            lines.append(f"    undo_{step.name} -.-> undo_{back}")
        else:
            lines += ['    compensated(["compensated"])', f"    undo_{step.name} -.-> compensated"]
        back = step.name
    return "\n".join([*lines, *_colours(definition, instance)]) + "\n"


def _label(step: Step, instance: Instance | None) -> str:
    deadline = f"{step.deadline.timeout:g} s"
    at = instance.steps.get(step.name) if instance else None
    if at is None:
        return _text(f"{step.name}<br/>within {deadline}")
    return _text(f"{step.name}<br/>{at.status.value}")


def _colours(definition: SagaDefinition, instance: Instance | None) -> list[str]:
    if instance is None:
        return []
    lines = [f"    {style}" for style in _STYLES]
    for step in definition.steps:
        at = instance.steps.get(step.name)
        if at is None:
            continue
        lines.append(f"    class {step.name} {_CLASSES[at.status]}")
        if step.undo is not None and at.undo_attempt:
            undone = {StepStatus.UNDONE: "done", StepStatus.UNDO_FAILED: "refused"}.get(at.status, "running")
            lines.append(f"    class undo_{step.name} {undone}")
    if instance.status in (Status.COMPLETED, Status.COMPENSATED):
        ends = any(step.undo for step in definition.steps) or instance.status is Status.COMPLETED
        lines += [f"    class {instance.status.value} done"] if ends else []
    return lines


def _text(words: str) -> str:
    return words.replace('"', "#quot;")
