"""A life cycle as a state diagram: Mermaid text, for a definition or for one entity with the way that it has gone."""

from collections.abc import Iterable

from coordinator.durations import lasting
from coordinator.lifecycles.definition import LifecycleDefinition
from coordinator.lifecycles.entity import Entity
from coordinator.lifecycles.rules import Deadlines, Transition

_STYLES = (
    "classDef here fill:#dbeafe,stroke:#1d4ed8,color:#0b2a6b",
    "classDef been fill:#d7f5dd,stroke:#1a7f37,color:#0b3d1a",
)


def state_diagram(definition: LifecycleDefinition, entity: Entity | None = None, been: Iterable[str] = ()) -> str:
    """Return a Mermaid state diagram of a life cycle.

    With an `entity`, its state has a colour, and so have the states where it has `been`.
    """
    lines = ["stateDiagram-v2", f"    [*] --> {definition.creation.to}: {_label(definition.creation)}"]
    for transition in definition.transitions.values():
        lines += [f"    {source} --> {transition.to}: {_label(transition)}" for source in transition.sources]
    lines += [f"    {state} --> [*]" for state in definition.states if not definition.out_of(state)]
    for deadline in definition.deadlines.values():
        lines += [
            f"    note right of {deadline.state}",
            *(f"        {each}" for each in _notes(deadline)),
            "    end note",
        ]
    if entity is not None:
        lines += [f"    {style}" for style in _STYLES]
        before = [state for state in definition.states if state in set(been) and state != entity.state]
        lines += [f"    class {state} been" for state in before]
        lines.append(f"    class {entity.state} here")
    return "\n".join(lines) + "\n"


def _label(transition: Transition) -> str:
    who = " or ".join(sorted(transition.roles))
    demands = [who if transition.by is None else f"{who}, only {transition.by}"]
    demands += [f"{transition.approvals} persons"] if transition.approvals > 1 else []
    demands += [f"not {' nor '.join(transition.four_eyes)}"] if transition.four_eyes else []
    demands += ["with a comment"] if transition.comment else []
    return f"{transition.name} ({', '.join(demands)})"


def _notes(deadline: Deadlines) -> list[str]:
    notes = []
    if deadline.remind_after is not None:
        again = f", then every {lasting(deadline.every)}" if deadline.every is not None else ""
        notes.append(f"reminder after {lasting(deadline.remind_after)}{again}")
    if deadline.escalate_after is not None:
        notes.append(f"after {lasting(deadline.escalate_after)} also {deadline.escalate_to}")
    return notes
