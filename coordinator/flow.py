"""The flow of a saga: how its steps follow each other. Everything composes; everything here is pure."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from coordinator.steps import Hook, Step
from coordinator.waits import Delay, Wait
from events.errors import DefinitionError

MOST_ITEMS = 100_000
DEFAULT_LIMIT = 100


@dataclass(frozen=True, slots=True)
class Sequence:
    """Parts that are taken one after the other, and undone in reverse, or all at once where that was declared."""

    parts: "tuple[Node, ...]"
    side_by_side: bool = False


class Stragglers(StrEnum):
    """What becomes of the branches that are under way when enough others are done."""

    UNDO = "undo"
    KEEP = "keep"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Parallel:
    """Parts, its branches, that are taken side by side, and undone side by side.

    Attributes:
        parts: the branches.
        needed: how many have to be done before the flow goes on. Where that is not all, a branch that fails is undone
            on its own, and the saga turns back only when too few are left.
        stragglers: what becomes of those that are under way then.
    """

    parts: "tuple[Node, ...]"
    needed: int
    stragglers: Stragglers = Stragglers.UNDO

    @property
    def may_fail(self) -> bool:
        """Whether a branch may fail without turning the saga back."""
        return self.needed < len(self.parts)


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


@dataclass(frozen=True, slots=True)
class Each:
    """One step for each item of a list, some of them at a time; each item is a row of its own.

    Attributes:
        items: the method of the saga that returns the list; asked once.
        step: the step; its methods take the item after the saga.
        limit: how many are under way at the same time.
        collect: whether the flow goes on when some items have failed; otherwise one is enough to turn back.
    """

    items: Hook
    step: Step
    limit: int = DEFAULT_LIMIT
    collect: bool = False

    @property
    def name(self) -> str:
        """The step's."""
        return self.step.name


Leaf = Step | Wait | Delay | Each
Node = Leaf | Sequence | Parallel | When


def sequence(*parts: Node, undo: str = "in_reverse") -> Sequence:
    """Take `parts` one after the other; undo them in reverse, or with `undo="side_by_side"` all at once."""
    if undo not in ("in_reverse", "side_by_side"):
        raise DefinitionError(f"sequence: undo is in_reverse or side_by_side, not {undo!r}")
    return Sequence(_checked("sequence", parts), undo == "side_by_side")


def parallel(*parts: Node, needed: int | str = "all", stragglers: str = Stragglers.UNDO) -> Parallel:
    """Take `parts` side by side, and go on when all of them are done, or as many as are needed.

    If all are needed and one fails, nothing new is begun in the others. Each is undone as soon as no answer is
    outstanding there.

    Args:
        parts: the branches.
        needed: "all", "any", or a number of branches. If fewer than all are needed, a branch that fails is undone alone
            while the others go on, and the saga turns back only when too few are left.
        stragglers: what becomes of branches that are under way when enough are done: `undo` calls them off and undoes
            what they did, `keep` lets them come to their end beside what follows, `wait` waits for them.
    """
    number = {"all": len(parts), "any": 1}.get(needed, needed) if isinstance(needed, str) else needed
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= max(1, len(parts)):
        raise DefinitionError(f"parallel: needed is 'all', 'any' or a number up to {len(parts)}, not {needed!r}")
    if stragglers not in list(Stragglers):
        raise DefinitionError(f"parallel: stragglers is one of {', '.join(Stragglers)}, not {stragglers!r}")
    return Parallel(_checked("parallel", parts), number, Stragglers(stragglers))


def each(
    items: Callable[[Any], list[Any]], step: Step, *, limit: int = DEFAULT_LIMIT, on_failure: str = "undo"
) -> Each:
    """Take `step` for each item of a list that a method of the saga returns; undo them all if the saga turns back.

    Args:
        items: the method; 100,000 items at most. What it returns is stored as JSON, and handed to the step so.
        step: the step. Its method and its compensation take the item: `def ship(self, item)`, its outcomes both:
            `def shipped(self, item, outcome)`. What such a method returns replaces the item.
        limit: how many items are under way at the same time.
        on_failure: `undo` turns back when an item has failed, `collect` undoes that item alone and goes on.
    """
    name = getattr(items, "__name__", "")
    if not callable(items) or not name.isidentifier():
        raise DefinitionError(f"each takes a method of the saga that returns the items; {items!r} has no name")
    if not isinstance(step, Step):
        raise DefinitionError(f"each takes a step; {step!r} is none: decorate it with @step")
    if step.pivot:
        raise DefinitionError(f"{step.name} is a pivot, and cannot be taken for each of several items")
    if not 1 <= limit <= MOST_ITEMS:
        raise DefinitionError(f"each: the limit counts from 1 to {MOST_ITEMS}, not {limit}")
    if on_failure not in ("undo", "collect"):
        raise DefinitionError(f"each: on_failure is undo or collect, not {on_failure!r}")
    return Each(Hook(items), step, limit, on_failure == "collect")


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
    if not isinstance(node, Leaf):
        for part in node.parts:
            yield from nodes(part)


def _checked(name: str, parts: tuple[Node, ...]) -> tuple[Node, ...]:
    for part in parts:
        if not isinstance(part, Node):
            raise DefinitionError(f"{name} takes steps and parts of a flow; {part!r} is none: decorate it with @step")
    if not parts:
        raise DefinitionError(f"{name} needs at least one part")
    return parts
