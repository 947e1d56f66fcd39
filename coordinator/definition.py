"""What a saga is: a class that is both its state and its definition. Everything here is pure."""

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, ClassVar, Self, get_type_hints

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from coordinator.flow import Each, Leaf, Node, Parallel, Sequence, When, nodes
from coordinator.instance import step_and_item
from coordinator.steps import LONGEST, Ending, Hook, Migration, OutcomeHook, Start, Step
from coordinator.waits import Delay, Wait
from events.errors import DefinitionError
from events.message import Command, Event, Message

_name_pattern = re.compile(r"[a-z][a-z0-9_]{0,99}")
_branch_pattern = re.compile(r"branch_[0-9]+")
_LONGEST_LOCK = 500
_words = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+")


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch that may fail without turning the saga back: its name, and the part and the place that it has."""

    name: str
    parallel: Parallel
    part: Node


@dataclass(frozen=True)
class SagaDefinition:
    """The parts of a saga class, checked and named.

    Attributes:
        by_name: the parts of its flow that have a state, by its name.
        branches: the branches of each parallel part that may go on without some of them.
    """

    name: str
    version: int
    cls: "type[Saga]"
    starts: tuple[Start, ...]
    flow: Node
    on_completed: Ending | None
    on_compensated: Ending | None
    deadline: float | None = None
    migrations: Mapping[int, Migration] = field(default_factory=dict)
    lock: str | None = None
    by_name: dict[str, Leaf] = field(default_factory=dict)
    branches: dict[Parallel, tuple[Branch, ...]] = field(default_factory=dict)
    _around: dict[str, tuple[Branch, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_name.update({node.name: node for node in nodes(self.flow) if isinstance(node, Leaf)})
        self._note_branches(self.flow, ())

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps of the flow, in the order in which they are written; also those taken for each of several items."""
        return tuple(step for name in self.by_name if (step := self.step_of(name)) is not None)

    @cached_property
    def fans(self) -> tuple[Each, ...]:
        """All steps of the flow that are taken for each of several items."""
        return tuple(node for node in self.by_name.values() if isinstance(node, Each))

    @cached_property
    def state_names(self) -> tuple[str, ...]:
        """The names of all states that an instance may have, but those of items."""
        whens = [node.condition.name for node in nodes(self.flow) if isinstance(node, When)]
        branches = [branch.name for each in self.branches.values() for branch in each]
        return (*self.by_name, *whens, *branches)

    @property
    def waits(self) -> tuple[Wait, ...]:
        """All parts of the flow that wait for an event."""
        return tuple(node for node in self.by_name.values() if isinstance(node, Wait))

    def step_of(self, name: str) -> Step | None:
        """Return the step whose state, or the state of one of whose items, has this name; None if it is no step's."""
        node = self.by_name.get(step_and_item(name)[0])
        if isinstance(node, Each):
            return node.step
        return node if isinstance(node, Step) else None

    def around(self, name: str) -> tuple[Branch, ...]:
        """Return the branches that may fail and have the part of this name in them, the outermost first."""
        return self._around.get(step_and_item(name)[0], ())

    def _note_branches(self, node: Node, around: tuple[Branch, ...]) -> None:
        if isinstance(node, Leaf):
            self._around[node.name] = around
            return
        if isinstance(node, When):
            self._around[node.condition.name] = around
        for number, part in enumerate(node.parts):
            inside = around
            if isinstance(node, Parallel) and node.may_fail:
                known = sum(map(len, self.branches.values())) if number == 0 else 0
                if number == 0:
                    self.branches[node] = tuple(
                        Branch(f"branch_{known + at}", node, each) for at, each in enumerate(node.parts, 1)
                    )
                inside = (*around, self.branches[node][number])
            self._note_branches(part, inside)

    def deadline_of(self, begun: datetime) -> datetime | None:
        """Return when a saga turns back whose work has `begun` then."""
        return None if self.deadline is None else begun + timedelta(seconds=self.deadline)

    def lock_of(self, saga: "Saga") -> str | None:
        """Return the business key that a new saga must hold to begin; None if it needs none.

        Raises:
            ValueError: it is empty, or longer than any key.
        """
        if self.lock is None:
            return None
        value = getattr(saga, self.lock)
        if value is None or not str(value) or len(str(value)) > _LONGEST_LOCK:
            raise ValueError(f"{self.name} must know its {self.lock!r} when it starts, {_LONGEST_LOCK} letters at most")
        return f"{self.lock}={value}"

    def start_for(self, message_type: str) -> Start:
        """Return the start whose event has this type."""
        return next(start for start in self.starts if start.event.message_type == message_type)

    @property
    def key_field(self) -> str | None:
        """The field that is the business key; None if different starts take different ones."""
        fields = {start.key or next(iter(self.cls.model_fields)) for start in self.starts}
        return fields.pop() if len(fields) == 1 else None

    def key_of(self, start: Start, saga: "Saga") -> str:
        """Return the business key of a new saga.

        Raises:
            ValueError: it is empty; all such starts would be duplicates of each other.
        """
        name = start.key or next(iter(self.cls.model_fields))
        key = getattr(saga, name)
        if key is None or not str(key):
            raise ValueError(f"{self.cls.__name__}.{start.name} left its business key {name!r} empty")
        return str(key)


class Saga(BaseModel):
    """A multi-step process: the fields are its state, the methods its definition. Methods must be pure.

    Class arguments:
        name: the saga's name; default is the class name in snake case.
        version: an instance is run to its end by the version that it started with.
        deadline: seconds from its start after which it turns back, unless a pivot has begun.
        lock: the field that holds a business key which one running saga may have at a time. Others that want it wait
            in line, of this and any saga whose lock is a field of the same name; their deadline counts from their turn.
    """

    model_config = ConfigDict(
        allow_inf_nan=False,
        extra="forbid",
        ignored_types=(Hook, Step, Start, Ending, Migration, OutcomeHook, Wait, Delay, Sequence, Parallel, When, Each),
    )

    definition: ClassVar[SagaDefinition]
    flow: ClassVar[Any] = None

    def __init_subclass__(
        cls,
        *,
        name: str | None = None,
        version: int = 1,
        deadline: float | None = None,
        lock: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the class arguments; pydantic hands them to `__pydantic_init_subclass__` as well."""
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(
        cls,
        *,
        name: str | None = None,
        version: int = 1,
        deadline: float | None = None,
        lock: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.definition = _define(cls, name or "_".join(_words.findall(cls.__name__)).lower(), version, deadline, lock)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Return the saga whose stored state this is."""
        return cls.model_validate_json(to_json(state))

    def to_state(self) -> dict[str, Any]:
        """Return the state as it is stored: plain JSON data."""
        return self.model_dump(mode="json", warnings=False)


def _define(cls: type[Saga], name: str, version: int, deadline: float | None, lock: str | None) -> SagaDefinition:
    parts = {attribute: value for base in reversed(cls.__mro__) for attribute, value in vars(base).items()}
    starts = tuple(value for value in parts.values() if isinstance(value, Start))
    endings = [value for value in parts.values() if isinstance(value, Ending)]
    on_completed = [ending for ending in endings if not ending.compensated]
    on_compensated = [ending for ending in endings if ending.compensated]
    steps = [value for value in parts.values() if isinstance(value, Step | Wait | Delay)]
    flow: Any = parts.get("flow")
    _require(bool(_name_pattern.fullmatch(name)), cls, f"the name {name!r} must be lower case words, 100 at most")
    _require(version >= 1, cls, f"versions count from 1, not {version}")
    _require(deadline is None or 0 < deadline <= LONGEST, cls, f"a deadline is positive, {LONGEST:.0f} s at most")
    _require_sound_lock(cls, lock, starts)
    _require(bool(cls.model_fields), cls, "a saga needs at least one field: its business key")
    _require(bool(starts), cls, "declare how it begins with @starts_on(Event)")
    _require(isinstance(flow, Node), cls, "declare its flow: flow = sequence(first, second, ...)")
    parts_of_flow = list(nodes(flow))
    leaves = [node.step if isinstance(node, Each) else node for node in parts_of_flow if isinstance(node, Leaf)]
    taken = [node for node in leaves if isinstance(node, Step)]
    names = [node.name for node in leaves] + [node.condition.name for node in parts_of_flow if isinstance(node, When)]
    _require(len(set(leaves)) == len(leaves), cls, "a step stands twice in its flow")
    _require(len(set(names)) == len(names), cls, "two steps or conditions of its flow have the same name")
    if unused := [each.name for each in steps if each not in leaves]:
        _require(False, cls, f"{', '.join(unused)} is not in its flow")
    _require(len(on_completed) <= 1 and len(on_compensated) <= 1, cls, "it has two endings of the same kind")
    for start in starts:
        _require(
            start.key is None or start.key in cls.model_fields, cls, f"the key {start.key!r} is none of its fields"
        )
    if len({start.event.message_type for start in starts}) != len(starts):
        _require(False, cls, "two starts have the same event")
    beside = {node for part in parts_of_flow if isinstance(part, Parallel) for node in nodes(part)}
    for each in taken:
        _require(not each.pivot or each.undo is None, cls, f"{each.name} is a pivot: there is no way back to undo it")
        _require(
            not each.pivot or each not in beside, cls, f"{each.name} is a pivot and cannot stand in a parallel part"
        )
    for name_of_part in names:
        _require(bool(_name_pattern.fullmatch(name_of_part)), cls, f"the step name {name_of_part!r} must be lower case")
        _require(
            not _branch_pattern.fullmatch(name_of_part), cls, f"{name_of_part} is the name of a branch: take another"
        )
    of_items = {node.step for node in parts_of_flow if isinstance(node, Each)}
    for each in taken:
        for hook in (each.on_succeeded, each.on_declined):
            if hook is not None:
                hook.outcome = _outcome_class(cls, hook, of_item=each in of_items)
    for wait in (node for node in leaves if isinstance(node, Wait)):
        _check_wait(cls, wait)
    return SagaDefinition(
        name,
        version,
        cls,
        starts,
        flow,
        on_completed[0] if on_completed else None,
        on_compensated[0] if on_compensated else None,
        deadline,
        _migrations(cls, version, parts.values(), names),
        lock,
    )


def _migrations(cls: type[Saga], version: int, parts: Iterable[Any], names: Iterable[str]) -> dict[int, Migration]:
    found = [value for value in parts if isinstance(value, Migration)]
    by_version = {each.from_version: each for each in found}
    _require(len(by_version) == len(found), cls, "it has two migrations from the same version")
    for each in found:
        _require(1 <= each.from_version != version, cls, f"{each.name} migrates from another version, not its own")
        strange = {*each.renamed.values(), *each.passed} - set(names)
        _require(not strange, cls, f"{each.name} names {', '.join(sorted(strange))}, which is not in its flow")
    return by_version


def _outcome_class(cls: type[Saga], hook: OutcomeHook, *, of_item: bool) -> type[Message]:
    parameters = list(inspect.signature(hook.function).parameters)
    hints = get_type_hints(hook.function)
    outcome = hints.get(parameters[-1]) if len(parameters) == (3 if of_item else 2) else None
    good = isinstance(outcome, type) and issubclass(outcome, Message) and not issubclass(outcome, Command)
    taken = "self, the item and the outcome" if of_item else "self and the outcome"
    _require(good, cls, f"{hook.name} must take {taken}, annotated with an Event or a Reply")
    return outcome  # type: ignore[return-value]  # checked just above


def _check_wait(cls: type[Saga], wait: Wait) -> None:
    for event in wait.events:
        _require(issubclass(event, Event), cls, f"{wait.name} waits for {event.__name__}, which is no Event")
        if missing := [name for name in wait.by if name not in event.model_fields]:
            _require(False, cls, f"{wait.name} is found by {missing[0]!r}, which is no field of {event.__name__}")
    if missing := [name for name in wait.by.values() if name not in cls.model_fields]:
        _require(False, cls, f"{wait.name} is found by {missing[0]!r}, which is none of its fields")


def _require_sound_lock(cls: type[Saga], lock: str | None, starts: tuple[Start, ...]) -> None:
    _require(lock is None or lock in cls.model_fields, cls, f"the lock {lock!r} is none of its fields")
    if lock is not None and any(issubclass(start.event, Command) for start in starts):
        _require(False, cls, "a child has no lock: it might wait for its parent, which holds what both of them need")


def _require(met: bool, cls: type[Saga], demand: str) -> None:
    if not met:
        raise DefinitionError(f"saga {cls.__name__}: {demand}")
