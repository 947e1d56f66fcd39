"""What an instance in flight depends on in its saga's definition, as data that can be kept and compared. Pure.

That is the structure of the flow: which steps there are and how they follow each other, which commands do and undo
them, and which outcomes they take. Deadlines and retries are policy and may change at any time. What methods do with
the state may change, too, but not everything goes: `coordinator sagas check` finds out.
"""

import hashlib
import json
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from coordinator.definition import SagaDefinition
from coordinator.flow import Each, Leaf, Node, Parallel, Sequence, When
from coordinator.steps import Hook, OutcomeHook, Step
from coordinator.waits import Delay, Wait
from events.message import Message

Structure = dict[str, Any]


def structure(definition: SagaDefinition) -> Structure:
    """Return what instances in flight depend on, as plain JSON data."""
    parts = {name: _part(node) for name, node in definition.by_name.items()}
    return {"flow": _shape(definition.flow), "steps": parts}


def fingerprint(of: Structure) -> str:
    """Return what two structures have in common if and only if they are the same: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(of, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(before: Structure, after: Structure) -> list[str]:
    """Return in words what has changed from one structure to another; nothing if they are the same."""
    old, new = before["steps"], after["steps"]
    found = [f"step {name} is gone" for name in old if name not in new]
    found += [f"step {name} is new" for name in new if name not in old]
    for name in (name for name in new if name in old):
        found += [
            f"{aspect} of step {name} was {_words(old[name].get(aspect))}, is {_words(new[name].get(aspect))}"
            for aspect in sorted({*old[name], *new[name]})
            if old[name].get(aspect) != new[name].get(aspect)
        ]
    if before["flow"] != after["flow"]:
        found.append(f"the flow was {before['flow']}, is {after['flow']}")
    return found


def _shape(node: Node) -> str:
    match node:
        case Sequence(parts):
            return f"sequence({', '.join(_shape(part) for part in parts)})"
        case Parallel(parts, needed):
            rest = f", needed={needed}" if node.may_fail else ""  # its branches then have a state of their own
            return f"parallel({', '.join(_shape(part) for part in parts)}{rest})"
        case When(condition, then, otherwise):
            rest = f", otherwise={_shape(otherwise)}" if otherwise is not None else ""
            return f"when({condition.name}, {_shape(then)}{rest})"
        case Each(items):
            return f"each({items.name}, {node.name})"
        case Step() | Wait() | Delay():
            return node.name


def _part(node: Leaf) -> dict[str, Any]:
    match node:
        case Wait():
            return {"waits for": " | ".join(each.message_type for each in node.events), "by": dict(node.by)}
        case Delay():
            return {"waits for": "time"}
        case Each(step=step) | (Step() as step):
            return _step(step)


def _step(step: Step) -> dict[str, Any]:
    return {
        "command": _returned(step),
        "compensation": _returned(step.undo),
        "declined": _taken(step.on_declined),
        "pivot": step.pivot,
        "succeeded": _taken(step.on_succeeded),
    }


def _taken(hook: OutcomeHook | None) -> str | None:
    return hook.outcome.message_type if hook is not None else None


def _returned(hook: Hook | None) -> str | None:
    """Return the types of what a method is annotated to return; "any" if nothing is said, None without a method."""
    if hook is None:
        return None
    try:
        annotation = get_type_hints(hook.function).get("return")
    except NameError:  # it names what is imported for type checkers only
        annotation = hook.function.__annotations__.get("return")
    found = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return " | ".join(sorted({_type_name(each) for each in found}))


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, Message):
        return annotation.message_type
    return annotation if isinstance(annotation, str) else "any"


def _words(value: Any) -> str:
    return "nothing" if value is None else str(value)
