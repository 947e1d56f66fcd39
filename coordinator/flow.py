"""The flow of a saga: how its steps follow each other. Everything composes; everything here is pure."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from coordinator.steps import Hook, Step
from events.errors import DefinitionError


@dataclass(frozen=True, slots=True)
class Sequence:
    """Parts that are taken one after the other, and undone in reverse."""

    parts: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class Parallel:
    """Parts that are taken side by side, and undone side by side; it is done when all of them are."""

    parts: "tuple[Node, ...]"


@dataclass(frozen=True, slots=True)
class When:
    """A part that is taken if a condition holds, and another one, or nothing, if it does not.

    The condition is asked once, when the flow comes here; its answer is kept.
    """

    condition: Hook
    then: "Node"
    otherwise: "Node | None"

    @property
    def parts(self) -> "tuple[Node, ...]":
        """Both ways."""
        return (self.then,) if self.otherwise is None else (self.then, self.otherwise)


Node = Step | Sequence | Parallel | When


def sequence(*parts: Node) -> Sequence:
    """Take `parts` one after the other; undo them in reverse."""
    return Sequence(_checked("sequence", parts))


def parallel(*parts: Node) -> Parallel:
    """Take `parts` side by side, and go on when all of them are done.

    If one of them fails, nothing new is begun in the others. Each is undone as soon as no answer is outstanding there.
    """
    return Parallel(_checked("parallel", parts))


def when(condition: Callable[[Any], bool], then: Node, *, otherwise: Node | None = None) -> When:
    """Take `then` if `condition` holds, a method of the saga that returns True or False; else `otherwise`, or nothing.

    The method's name stands for the decision in the saga's steps and history, so it is not a lambda.
    """
    name = getattr(condition, "__name__", "")
    if not callable(condition) or not name.isidentifier():
        raise DefinitionError(f"when takes a method of the saga as its condition; {condition!r} has no name")
    _checked("when", (then,) if otherwise is None else (then, otherwise))
    return When(Hook(condition), then, otherwise)


def nodes(node: Node) -> Iterator[Node]:
    """Return `node` and all its parts, in the order in which they are written."""
    yield node
    if not isinstance(node, Step):
        for part in node.parts:
            yield from nodes(part)


def _checked(name: str, parts: tuple[Node, ...]) -> tuple[Node, ...]:
    for part in parts:
        if not isinstance(part, Step | Sequence | Parallel | When):
            raise DefinitionError(f"{name} takes steps and parts of a flow; {part!r} is none: decorate it with @step")
    if not parts:
        raise DefinitionError(f"{name} needs at least one part")
    return parts
