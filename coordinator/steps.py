"""The methods of a saga and their roles: how it starts, its steps with their compensations, how it ends. Pure."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from events.errors import DefinitionError
from events.message import Command, Event, Message

DEFAULT_TIMEOUT = 300.0
DEFAULT_UNDO_RESENDS = 5
DEFAULT_RECOVERY_ATTEMPTS = 10
LONGEST = 10 * 366 * 86_400.0  # seconds: ten years
_MOST_RESENDS = 100

HookT = TypeVar("HookT", bound="Hook")


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
        if not 0 < self.timeout <= LONGEST or not 0 <= self.resends <= _MOST_RESENDS:
            raise DefinitionError(
                f"a timeout must be positive and resends not negative, {LONGEST:.0f} s and {_MOST_RESENDS} at most"
            )

    def wait(self, sends: int) -> float:
        """Return the seconds to wait after the given number of sends."""
        return min(LONGEST, self.timeout * 2.0 ** (sends - 1))


@dataclass(frozen=True, slots=True)
class Backoff:
    """How often something is asked for anew after its handler has given it up, and when. Times are in seconds.

    Each attempt is a command of its own, with the idempotency key of the first, so handlers do nothing twice.

    Attributes:
        attempts: how many there are in all.
        first: the wait before the second one,
        factor: by what each further wait is longer,
        most: and the longest.
    """

    attempts: int
    first: float = 30.0
    factor: float = 2.0
    most: float = 3600.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 < self.first <= self.most <= LONGEST or not self.factor >= 1:
            raise DefinitionError(f"{self}: attempts count from 1, times are positive, and the factor is at least 1")

    def wait(self, attempt: int) -> float:
        """Return the seconds to wait after the attempt of this number."""
        try:
            return min(self.most, self.first * self.factor ** (attempt - 1))
        except OverflowError:
            return self.most


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
    """A method that makes a saga of a start event, or of the command of a parent, which another command undoes."""

    def __init__(
        self,
        function: Callable[..., Any],
        event: type[Message],
        key: str | None,
        undone_by: type[Command] | None = None,
    ) -> None:
        # It may be marked as a class method, too, which says to type checkers what it is.
        super().__init__(function.__func__ if isinstance(function, classmethod) else function)
        self.event = event
        self.key = key
        self.undone_by = undone_by

    def __get__(self, instance: Any, owner: type) -> Any:
        return self.function.__get__(owner, type(owner))


class Step(Hook):
    """One command with its outcomes, its deadline and its compensation."""

    def __init__(
        self,
        function: Callable[..., Any],
        deadline: Deadline,
        *,
        pivot: bool = False,
        recovery: Backoff | None = None,
    ) -> None:
        super().__init__(function)
        self.deadline = deadline
        self.pivot = pivot
        self.recovery = recovery or Backoff(DEFAULT_RECOVERY_ATTEMPTS)
        self.undo_retry = Backoff(1)
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
        self, /, *, timeout: float | None = ..., resends: int = ..., retry: Backoff | None = ...
    ) -> Callable[[Callable[..., Any]], Hook]: ...
    def compensation(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        timeout: float | None = None,
        resends: int = DEFAULT_UNDO_RESENDS,
        retry: Backoff | None = None,
    ) -> Hook | Callable[[Callable[..., Any]], Hook]:
        """Declare the method that returns the command which undoes this step.

        It is sent when the step has succeeded or when nobody knows whether it has, so its handler must do
        nothing gracefully where there is nothing to undo.

        Args:
            function: the method.
            timeout: seconds to wait for the answer; by default the step's.
            resends: how often it is sent again before it counts as failed.
            retry: how often a compensation that has failed is asked for anew; by default a person is called at once.
        """

        def decorate(function: Callable[..., Any]) -> Hook:
            hook = Hook(function)
            self.undo = self._once(self.undo, hook)
            self.undo_deadline = Deadline(self.deadline.timeout if timeout is None else timeout, resends)
            self.undo_retry = retry or self.undo_retry
            return hook

        return decorate if function is None else decorate(function)

    def _once(self, known: Hook | None, hook: HookT) -> HookT:
        if known is not None:
            raise DefinitionError(f"step {self.name}: {known.name} and {hook.name} have the same role")
        return hook


def starts_on(
    message: type[Event | Command], *, key: str | None = None, undone_by: type[Command] | None = None
) -> Callable[[Callable[..., Any]], Start]:
    """Declare the class method that makes a new saga of `message`; writing @classmethod below it is optional.

    Args:
        message: the start event; or a command, which makes it the child of the saga that sends it. Its end is the
            answer to that step: completed is succeeded, compensated is declined.
        key: the field of the saga that is its business key; by default its first field. A second start
            with the same key is a duplicate.
        undone_by: the command that is the compensation of the parent's step: the child is undone then.
    """
    if undone_by is not None and not (issubclass(message, Command) and issubclass(undone_by, Command)):
        raise DefinitionError(f"starts_on({message.__name__}): undone_by is a command, of a saga that a command starts")
    return lambda function: Start(function, message, key, undone_by)


@overload
def step(function: Callable[..., Any], /) -> Step: ...
@overload
def step(
    *, timeout: float = ..., resends: int = ..., pivot: bool = ..., recovery: Backoff | None = ...
) -> Callable[[Callable[..., Any]], Step]: ...
def step(
    function: Callable[..., Any] | None = None,
    /,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    resends: int = 0,
    pivot: bool = False,
    recovery: Backoff | None = None,
) -> Step | Callable[[Callable[..., Any]], Step]:
    """Declare a step: a method that returns the command to send.

    Args:
        function: the method.
        timeout: seconds to wait for the answer. After that the outcome is unknown, and the saga is undone.
        resends: how often the same command is sent again before that.
        pivot: once it has succeeded there is no way back: what follows is tried anew instead of undone. While nobody
            knows whether it has, it is tried anew, too. (Garcia-Molina and Salem, "Sagas", 1987, section 5, forward
            recovery; the name is Richardson's, "Microservices Patterns", section 4.3.)
        recovery: how often it is tried anew where there is no way back; then a person must look.
    """

    def decorate(function: Callable[..., Any]) -> Step:
        return Step(function, Deadline(timeout, resends), pivot=pivot, recovery=recovery)

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


class Migration(Hook):
    """A method that makes a saga of this version of one of another version."""

    def __init__(
        self, function: Callable[..., Any], from_version: int, renamed: Mapping[str, str], passed: Iterable[str]
    ) -> None:
        # It may be marked as a class method, too, which says to type checkers what it is.
        super().__init__(function.__func__ if isinstance(function, classmethod) else function)
        self.from_version = from_version
        self.renamed = dict(renamed)
        self.passed = frozenset(passed)

    def __get__(self, instance: Any, owner: type) -> Any:
        return self.function.__get__(owner, type(owner))


def migrates(
    from_: int, *, renamed: Mapping[str, str] | None = None, passed: Iterable[str] = ()
) -> Callable[[Callable[..., Any]], Migration]:
    """Declare the class method that takes an instance over from another version; @classmethod below it is optional.

    It is given the old saga and returns one of its own class; what it raises is why this instance stays as it is. Steps
    keep their names, and what has begun must have its place in the new flow.

    Args:
        from_: the other version; a newer one for the way back.
        renamed: old names of steps, or conditions, and their new ones. A step must be over, and have nothing to undo.
        passed: steps without a compensation that count as done where the instance is past them already, and conditions
            that then count as not taken.
    """
    return lambda function: Migration(function, from_, renamed or {}, passed)
