"""What a saga is: a class that is both its state and its definition. Everything here is pure."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar, get_type_hints, overload

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from events.errors import DefinitionError
from events.message import Command, Event, Message

DEFAULT_TIMEOUT = 300.0
DEFAULT_UNDO_RESENDS = 5
_LONGEST = 10 * 366 * 86_400.0  # seconds: ten years
_MOST_RESENDS = 100

HookT = TypeVar("HookT", bound="Hook")
_name_pattern = re.compile(r"[a-z][a-z0-9_]{0,99}")
_words = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+")


@dataclass(frozen=True, slots=True)
class Deadline:
    """How long an answer may take.

    Attributes:
        timeout: seconds from sending a command to giving up on its answer.
        resends: how often the same command is sent again before that; each wait is twice the one before.
    """

    timeout: float
    resends: int

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= _LONGEST or not 0 <= self.resends <= _MOST_RESENDS:
            raise DefinitionError(
                f"a timeout must be positive and resends not negative, {_LONGEST:.0f} s and {_MOST_RESENDS} at most"
            )

    def wait(self, sends: int) -> float:
        """Return the seconds to wait after the given number of sends."""
        return min(_LONGEST, self.timeout * 2.0 ** (sends - 1))


class Hook:
    """A method of a saga with a role. On an instance it is an ordinary method, so that it can be tested."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = function.__name__
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else self.function.__get__(instance, owner)


class OutcomeHook(Hook):
    """A method that takes the outcome of a step into the state; its annotation says which message that is."""

    outcome: type[Message]


class Start(Hook):
    """A method that makes a saga of a start event."""

    def __init__(self, function: Callable[..., Any], event: type[Event], key: str | None) -> None:
        # It may be marked as a class method, too, which says to type checkers what it is.
        super().__init__(function.__func__ if isinstance(function, classmethod) else function)
        self.event = event
        self.key = key

    def __get__(self, instance: Any, owner: type) -> Any:
        return self.function.__get__(owner, type(owner))


class Step(Hook):
    """One command with its outcomes, its deadline and its compensation."""

    def __init__(self, function: Callable[..., Any], deadline: Deadline) -> None:
        super().__init__(function)
        self.deadline = deadline
        self.undo: Hook | None = None
        self.undo_deadline = Deadline(deadline.timeout, DEFAULT_UNDO_RESENDS)
        self.on_succeeded: OutcomeHook | None = None
        self.on_declined: OutcomeHook | None = None

    def succeeded(self, function: Callable[..., Any]) -> OutcomeHook:
        """Declare the method that takes a success into the state: `def charged(self, outcome: PaymentCaptured)`."""
        hook = OutcomeHook(function)
        self.on_succeeded = self._once(self.on_succeeded, hook)
        return hook

    def declined(self, function: Callable[..., Any]) -> OutcomeHook:
        """Declare the method that takes a business no into the state: `def refused(self, outcome: PaymentFailed)`."""
        hook = OutcomeHook(function)
        self.on_declined = self._once(self.on_declined, hook)
        return hook

    @overload
    def compensation(self, function: Callable[..., Any], /) -> Hook: ...
    @overload
    def compensation(
        self, /, *, timeout: float | None = ..., resends: int = ...
    ) -> Callable[[Callable[..., Any]], Hook]: ...
    def compensation(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        timeout: float | None = None,
        resends: int = DEFAULT_UNDO_RESENDS,
    ) -> Hook | Callable[[Callable[..., Any]], Hook]:
        """Declare the method that returns the command which undoes this step.

        It is sent when the step has succeeded or when nobody knows whether it has, so its handler must do
        nothing gracefully where there is nothing to undo.

        Args:
            function: the method.
            timeout: seconds to wait for the answer; by default the step's.
            resends: how often it is sent again before it counts as failed.
        """

        def decorate(function: Callable[..., Any]) -> Hook:
            hook = Hook(function)
            self.undo = self._once(self.undo, hook)
            self.undo_deadline = Deadline(self.deadline.timeout if timeout is None else timeout, resends)
            return hook

        return decorate if function is None else decorate(function)

    def _once(self, known: Hook | None, hook: HookT) -> HookT:
        if known is not None:
            raise DefinitionError(f"step {self.name}: {known.name} and {hook.name} have the same role")
        return hook


@dataclass(frozen=True, slots=True)
class Sequence:
    """Steps that are taken one after the other, and undone in reverse."""

    steps: tuple[Step, ...]


def sequence(*steps: Step) -> Sequence:
    """Take `steps` one after the other; undo them in reverse."""
    for part in steps:
        if not isinstance(part, Step):
            raise DefinitionError(f"sequence takes steps; {part!r} is none: decorate it with @step")
    return Sequence(steps)


def starts_on(event: type[Event], *, key: str | None = None) -> Callable[[Callable[..., Any]], Start]:
    """Declare the class method that makes a new saga of `event`; writing @classmethod below it is optional.

    Args:
        event: the start event.
        key: the field of the saga that is its business key; by default its first field. A second start
            with the same key is a duplicate.
    """
    return lambda function: Start(function, event, key)


@overload
def step(function: Callable[..., Any], /) -> Step: ...
@overload
def step(*, timeout: float = ..., resends: int = ...) -> Callable[[Callable[..., Any]], Step]: ...
def step(
    function: Callable[..., Any] | None = None, /, *, timeout: float = DEFAULT_TIMEOUT, resends: int = 0
) -> Step | Callable[[Callable[..., Any]], Step]:
    """Declare a step: a method that returns the command to send.

    Args:
        function: the method.
        timeout: seconds to wait for the answer. After that the outcome is unknown, and the saga is undone.
        resends: how often the same command is sent again before that.
    """

    def decorate(function: Callable[..., Any]) -> Step:
        return Step(function, Deadline(timeout, resends))

    return decorate if function is None else decorate(function)


class Ending(Hook):
    """A method that returns the event to publish when the saga has ended."""

    def __init__(self, function: Callable[..., Any], *, compensated: bool) -> None:
        super().__init__(function)
        self.compensated = compensated


def completed(function: Callable[..., Any]) -> Ending:
    """Declare the method that returns the event to publish (or None) when all steps have succeeded."""
    return Ending(function, compensated=False)


def compensated(function: Callable[..., Any]) -> Ending:
    """Declare the method that returns the event to publish (or None) when all is undone; it is given the reason."""
    return Ending(function, compensated=True)


@dataclass(frozen=True)
class SagaDefinition:
    """The parts of a saga class, checked and named."""

    name: str
    version: int
    cls: "type[Saga]"
    starts: tuple[Start, ...]
    steps: tuple[Step, ...]
    on_completed: Ending | None
    on_compensated: Ending | None
    by_name: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_name.update({each.name: each for each in self.steps})

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
    """

    model_config = ConfigDict(
        allow_inf_nan=False, extra="forbid", ignored_types=(Hook, Step, Start, Ending, OutcomeHook, Sequence)
    )

    definition: ClassVar[SagaDefinition]
    flow: ClassVar[Any] = None

    def __init_subclass__(cls, *, name: str | None = None, version: int = 1, **kwargs: Any) -> None:
        """Take the class arguments; pydantic hands them to `__pydantic_init_subclass__` as well."""
        super().__init_subclass__(**kwargs)

    @classmethod
    def __pydantic_init_subclass__(cls, *, name: str | None = None, version: int = 1, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.definition = _define(cls, name or "_".join(_words.findall(cls.__name__)).lower(), version)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Return the saga whose stored state this is."""
        return cls.model_validate_json(to_json(state))

    def to_state(self) -> dict[str, Any]:
        """Return the state as it is stored: plain JSON data."""
        return self.model_dump(mode="json", warnings=False)


def _define(cls: type[Saga], name: str, version: int) -> SagaDefinition:
    parts = {attribute: value for base in reversed(cls.__mro__) for attribute, value in vars(base).items()}
    starts = tuple(value for value in parts.values() if isinstance(value, Start))
    endings = [value for value in parts.values() if isinstance(value, Ending)]
    on_completed = [ending for ending in endings if not ending.compensated]
    on_compensated = [ending for ending in endings if ending.compensated]
    steps = [value for value in parts.values() if type(value) is Step]
    flow = parts.get("flow")
    _require(bool(_name_pattern.fullmatch(name)), cls, f"the name {name!r} must be lower case words, 100 at most")
    _require(version >= 1, cls, f"versions count from 1, not {version}")
    _require(bool(cls.model_fields), cls, "a saga needs at least one field: its business key")
    _require(bool(starts), cls, "declare how it begins with @starts_on(Event)")
    _require(isinstance(flow, Sequence), cls, "declare its flow: flow = sequence(first, second, ...)")
    assert isinstance(flow, Sequence)  # noqa: S101  # told to the type checker; required above
    _require(bool(flow.steps), cls, "its flow is empty")
    _require(len(set(flow.steps)) == len(flow.steps), cls, "a step stands twice in its flow")
    _require(
        len({each.name for each in flow.steps}) == len(flow.steps), cls, "two steps of its flow have the same name"
    )
    if unused := [each.name for each in steps if each not in flow.steps]:
        _require(False, cls, f"{', '.join(unused)} is not in its flow")
    _require(len(on_completed) <= 1 and len(on_compensated) <= 1, cls, "it has two endings of the same kind")
    for start in starts:
        _require(
            start.key is None or start.key in cls.model_fields, cls, f"the key {start.key!r} is none of its fields"
        )
    if len({start.event.message_type for start in starts}) != len(starts):
        _require(False, cls, "two starts have the same event")
    for each in flow.steps:
        _require(bool(_name_pattern.fullmatch(each.name)), cls, f"the step name {each.name!r} must be lower case")
        for hook in (each.on_succeeded, each.on_declined):
            if hook is not None:
                hook.outcome = _outcome_class(cls, hook)
    return SagaDefinition(
        name,
        version,
        cls,
        starts,
        flow.steps,
        on_completed[0] if on_completed else None,
        on_compensated[0] if on_compensated else None,
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
