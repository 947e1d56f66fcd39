"""What a life cycle is: a class that is both the data of an entity and the rules of its states. Everything is pure."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from coordinator.lifecycles.rules import Deadlines, Transition
from coordinator.steps import Hook
from events.errors import DefinitionError
from events.message import dotted

_name_pattern = re.compile(r"[a-z][a-z0-9_]{0,99}")


@dataclass(frozen=True)
class LifecycleDefinition:
    """The parts of a life cycle class, checked and named.

    Attributes:
        creation: the transition that begins it.
        transitions: all others, by name, as they are written.
        states: all states, in the order in which they are reached.
        deadlines: what happens in a state by deadline.
    """

    name: str
    version: int
    cls: "type[Lifecycle]"
    creation: Transition
    transitions: dict[str, Transition]
    states: tuple[str, ...]
    deadlines: dict[str, Deadlines]

    @property
    def key_field(self) -> str:
        """The field that holds the business key: the first one."""
        return next(iter(self.cls.model_fields))

    def out_of(self, state: str) -> list[Transition]:
        """Return the transitions that lead out of a state; none for a final one."""
        return [each for each in self.transitions.values() if state in each.sources]


class Lifecycle(BaseModel):
    """The life cycle of an entity: the fields are its data, the methods its rules. Methods must be pure.

        class Invoice(Lifecycle):
            number: str
            clerk: str

            @transition(to="open", roles="clerk", by="clerk")
            def enter(self, act: Act) -> None: ...

            @transition("open", to="paid", roles="manager", four_eyes="clerk")
            def pay(self, act: Act) -> InvoicePaid: ...

    The first field is the business key. Exactly one transition has no source: it creates an entity.

    Class arguments:
        name: the name of the life cycle; default is the class name in snake case.
        version: an entity keeps the version that it was created with.
    """

    model_config = ConfigDict(
        allow_inf_nan=False, extra="forbid", frozen=True, ignored_types=(Deadlines, Hook, Transition)
    )

    definition: ClassVar[LifecycleDefinition]

    def __init_subclass__(cls, *, name: str | None = None, version: int = 1, **kwargs: Any) -> None:
        """Take the class arguments; pydantic hands them to `__pydantic_init_subclass__` as well."""
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, *, name: str | None = None, version: int = 1, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.definition = _define(cls, name or dotted(cls.__name__).replace(".", "_"), version)

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Self:
        """Return the entity whose stored data this is."""
        return cls.model_validate_json(to_json(data))

    def to_data(self) -> dict[str, Any]:
        """Return the data as it is stored: plain JSON data."""
        return self.model_dump(mode="json")


def _define(cls: type[Lifecycle], name: str, version: int) -> LifecycleDefinition:
    parts = {attribute: value for base in reversed(cls.__mro__) for attribute, value in vars(base).items()}
    given = [value for value in parts.values() if isinstance(value, Transition)]
    declared = [value for value in parts.values() if isinstance(value, Deadlines)]
    creations = [each for each in given if not each.sources]
    _require(bool(_name_pattern.fullmatch(name)), cls, f"the name {name!r} must be lower case words, 100 at most")
    _require(version >= 1, cls, f"versions count from 1, not {version}")
    _require(bool(cls.model_fields), cls, "it needs at least one field: its business key")
    _require(
        len(creations) == 1,
        cls,
        "exactly one transition has no source state: the one that creates an entity, as in"
        " @transition(to='draft', roles='author')",
    )
    transitions = {each.name: each for each in given if each.sources}
    states = _reached(creations[0], transitions)
    fields = set(cls.model_fields)
    kept = {next(iter(cls.model_fields))} | {name for each in given for name in (each.by, *each.four_eyes) if name}
    kept |= {each.escalate_to for each in declared if each.escalate_to}
    for each in given:
        _check(cls, each, fields, {*transitions, creations[0].name})
        if fixed := each.edits & kept:
            _require(False, cls, f"{each.name}: {min(fixed)!r} says who it is or who may act, so it cannot be edited")
        if lost := [source for source in each.sources if source not in states]:
            _require(False, cls, f"{each.name} leads out of {lost[0]!r}, which nothing leads to")
    _require(
        creations[0].approvals == 1 and not creations[0].edits and not creations[0].four_eyes,
        cls,
        f"{creations[0].name} creates an entity: it has no votes, no edits, and nobody before who could be different",
    )
    deadlines = {each.state: each for each in declared}
    _require(len(deadlines) == len(declared), cls, "a state is declared twice")
    leaving = {source for each in transitions.values() for source in each.sources}
    for state in deadlines:
        _require(state in states, cls, f"nothing leads to the state {state!r}; it has: {', '.join(states)}")
        _require(state in leaving, cls, f"{state!r} is final: nobody could do what a reminder asks for")
    return LifecycleDefinition(name, version, cls, creations[0], transitions, states, deadlines)


def _reached(creation: Transition, transitions: dict[str, Transition]) -> tuple[str, ...]:
    """Return the states that can be reached, in the order in which they are."""
    found = {creation.to: None}
    waiting = [creation.to]
    while waiting:
        state = waiting.pop(0)
        for each in transitions.values():
            if state in each.sources and each.to not in found:
                found[each.to] = None
                waiting.append(each.to)
    return tuple(found)


def _check(cls: type[Lifecycle], each: Transition, fields: set[str], names: set[str]) -> None:
    for state in (*each.sources, each.to):
        _require(bool(_name_pattern.fullmatch(state)), cls, f"the state {state!r} must be lower case words")
    _require(bool(each.roles), cls, f"nobody may {each.name}; name its roles")
    _require(each.approvals >= 1, cls, f"{each.name}: approvals count from 1, not {each.approvals}")
    _require(
        each.approvals == 1 or each.by is None, cls, f"{each.name} needs several persons, but only one may take it"
    )
    _require(each.approvals == 1 or not each.edits, cls, f"{each.name}: what several persons vote on cannot be edited")
    _require(each.by is None or each.by in fields, cls, f"{each.name}: by={each.by!r} is none of its fields")
    for name in each.four_eyes:
        _require(
            (name in fields) != (name in names),
            cls,
            f"{each.name}: four_eyes={name!r} must be one of its fields, or one of its transitions",
        )
    if strange := each.edits - fields:
        _require(False, cls, f"{each.name}: edits={min(strange)!r} is none of its fields")


def _require(met: bool, cls: type[Lifecycle], demand: str) -> None:
    if not met:
        raise DefinitionError(f"life cycle {cls.__name__}: {demand}")
