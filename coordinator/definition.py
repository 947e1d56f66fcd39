"""What a saga is: a class that is both its state and its definition. Everything here is pure."""

import inspect
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, get_type_hints

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from coordinator.flow import Node, Parallel, Sequence, When, nodes
from coordinator.steps import LONGEST, Ending, Hook, OutcomeHook, Start, Step
from events.errors import DefinitionError
from events.message import Command, Message

_name_pattern = re.compile(r"[a-z][a-z0-9_]{0,99}")
_words = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+")


@dataclass(frozen=True)
class SagaDefinition:
    """The parts of a saga class, checked and named."""

    name: str
    version: int
    cls: "type[Saga]"
    starts: tuple[Start, ...]
    flow: Node
    on_completed: Ending | None
    on_compensated: Ending | None
    deadline: float | None = None
    by_name: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_name.update({node.name: node for node in nodes(self.flow) if isinstance(node, Step)})

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps of the flow, in the order in which they are written."""
        return tuple(self.by_name.values())

    def start_for(self, message_type: str) -> Start:
        """Return the start whose event has this type."""
        return next(start for start in self.starts if start.event.message_type == message_type)

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
    """

    model_config = ConfigDict(
        allow_inf_nan=False,
        extra="forbid",
        ignored_types=(Hook, Step, Start, Ending, OutcomeHook, Sequence, Parallel, When),
    )

    definition: ClassVar[SagaDefinition]
    flow: ClassVar[Any] = None

    def __init_subclass__(
        cls, *, name: str | None = None, version: int = 1, deadline: float | None = None, **kwargs: Any
    ) -> None:
        """Take the class arguments; pydantic hands them to `__pydantic_init_subclass__` as well."""
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(
        cls, *, name: str | None = None, version: int = 1, deadline: float | None = None, **kwargs: Any
    ) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.definition = _define(cls, name or "_".join(_words.findall(cls.__name__)).lower(), version, deadline)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Return the saga whose stored state this is."""
        return cls.model_validate_json(to_json(state))

    def to_state(self) -> dict[str, Any]:
        """Return the state as it is stored: plain JSON data."""
        return self.model_dump(mode="json", warnings=False)


def _define(cls: type[Saga], name: str, version: int, deadline: float | None) -> SagaDefinition:
    parts = {attribute: value for base in reversed(cls.__mro__) for attribute, value in vars(base).items()}
    starts = tuple(value for value in parts.values() if isinstance(value, Start))
    endings = [value for value in parts.values() if isinstance(value, Ending)]
    on_completed = [ending for ending in endings if not ending.compensated]
    on_compensated = [ending for ending in endings if ending.compensated]
    steps = [value for value in parts.values() if type(value) is Step]
    flow: Any = parts.get("flow")
    _require(bool(_name_pattern.fullmatch(name)), cls, f"the name {name!r} must be lower case words, 100 at most")
    _require(version >= 1, cls, f"versions count from 1, not {version}")
    _require(deadline is None or 0 < deadline <= LONGEST, cls, f"a deadline is positive, {LONGEST:.0f} s at most")
    _require(bool(cls.model_fields), cls, "a saga needs at least one field: its business key")
    _require(bool(starts), cls, "declare how it begins with @starts_on(Event)")
    _require(isinstance(flow, Node), cls, "declare its flow: flow = sequence(first, second, ...)")
    parts_of_flow = list(nodes(flow))
    taken = [node for node in parts_of_flow if isinstance(node, Step)]
    names = [node.name for node in taken] + [node.condition.name for node in parts_of_flow if isinstance(node, When)]
    _require(len(set(taken)) == len(taken), cls, "a step stands twice in its flow")
    _require(len(set(names)) == len(names), cls, "two steps or conditions of its flow have the same name")
    if unused := [each.name for each in steps if each not in taken]:
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
    for each in taken:
        for hook in (each.on_succeeded, each.on_declined):
            if hook is not None:
                hook.outcome = _outcome_class(cls, hook)
    return SagaDefinition(
        name,
        version,
        cls,
        starts,
        flow,
        on_completed[0] if on_completed else None,
        on_compensated[0] if on_compensated else None,
        deadline,
    )


def _outcome_class(cls: type[Saga], hook: OutcomeHook) -> type[Message]:
    parameters = list(inspect.signature(hook.function).parameters)
    hints = get_type_hints(hook.function)
    outcome = hints.get(parameters[1]) if len(parameters) == 2 else None  # noqa: PLR2004  # self and the outcome
    good = isinstance(outcome, type) and issubclass(outcome, Message) and not issubclass(outcome, Command)
    _require(good, cls, f"{hook.name} must take self and the outcome, annotated with an Event or a Reply")
    return outcome  # type: ignore[return-value]  # checked just above


def _require(met: bool, cls: type[Saga], demand: str) -> None:
    if not met:
        raise DefinitionError(f"saga {cls.__name__}: {demand}")
