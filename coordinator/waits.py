"""Parts of a flow that wait: for an event of the business, or for time to pass. Everything here is pure."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from enum import StrEnum
from typing import Any

from pydantic_core import to_json

from coordinator.steps import LONGEST, Hook, HookT, OutcomeHook
from events.errors import DefinitionError
from events.message import Event

DEFAULT_KEEP = 86_400.0


class Early(StrEnum):
    """What becomes of an event that no saga waits for yet."""

    PARK = "park"
    IGNORE = "ignore"
    DEAD_LETTER = "dead_letter"


class Wait(OutcomeHook):
    """A part that waits for a business event; its method takes the event into the state.

    Attributes:
        by: fields of the event, and the fields of the saga that have the same values.
        timeout: seconds until it counts as not done; None for as long as it takes.
        early: what becomes of an event that no saga waits for yet.
        keep: seconds that such an event is parked for.
        on_declined: takes the event that says no.
        on_expired: takes it into the state that nothing has come; the saga then goes on.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        event: type[Event],
        *,
        by: Mapping[str, str],
        timeout: float | None,
        early: Early,
        keep: float,
    ) -> None:
        super().__init__(function)
        self.outcome = event
        self.by = by
        self.timeout = timeout
        self.early = early
        self.keep = keep
        self.on_declined: OutcomeHook | None = None
        self.on_expired: Hook | None = None

    @property
    def events(self) -> tuple[type[Event], ...]:
        """The events that end it."""
        hooks = (self, self.on_declined) if self.on_declined else (self,)
        return tuple(hook.outcome for hook in hooks)  # type: ignore[misc]  # @awaits and declined_by take events only

    def values_of(self, source: object, *, of_event: bool) -> str:
        """Return the values that an event, or the state of a saga, is found by: the same text if they match.

        Raises:
            ValueError: one of them is empty, so that it would match what it has nothing to do with.
        """
        fields = list(self.by if of_event else self.by.values())
        values = [getattr(source, field) for field in fields]
        if empty := [field for field, value in zip(fields, values, strict=True) if value is None or value == ""]:
            raise ValueError(f"{type(source).__name__}.{empty[0]} is empty, and {self.name} is found by it")
        return to_json(values).decode()

    def declined_by(self, event: type[Event]) -> Callable[[Callable[..., Any]], OutcomeHook]:
        """Declare the event that says no, and the method that takes it into the state; the saga then turns back."""

        def decorate(function: Callable[..., Any]) -> OutcomeHook:
            hook = OutcomeHook(function)
            hook.outcome = event
            self.on_declined = self._once(self.on_declined, hook)
            return hook

        return decorate

    def expired(self, function: Callable[..., Any]) -> Hook:
        """Declare the method for the case that nothing comes in time: the saga takes that in, and goes on."""
        hook = Hook(function)
        self.on_expired = self._once(self.on_expired, hook)
        return hook

    def _once(self, known: Hook | None, hook: HookT) -> HookT:
        if known is not None:
            raise DefinitionError(f"wait {self.name}: {known.name} and {hook.name} have the same role")
        return hook


class Delay(Hook):
    """A part that lets time pass; its method says how much: seconds, or a `timedelta`."""


def awaits(
    event: type[Event],
    *,
    by: str | tuple[str, ...] | Mapping[str, str],
    timeout: float | None = None,
    early: str = Early.PARK,
    keep: float = DEFAULT_KEEP,
) -> Callable[[Callable[..., Any]], Wait]:
    """Declare a part of the flow that waits for `event`: a method that takes the event into the state.

    Args:
        event: the event.
        by: what it has in common with its saga: the name of a field that both have, several such names, or a mapping
            of the event's fields to the saga's.
        timeout: seconds to wait. After that the saga turns back, or goes on if there is a method for that: `expired`.
        early: what becomes of an event while no saga waits for it: `park` keeps it until one does, `ignore` drops it,
            `dead_letter` keeps it for a person to see.
        keep: seconds that a parked event is kept for.
    """
    fields = by if isinstance(by, Mapping) else dict.fromkeys((by,) if isinstance(by, str) else by, "")
    names = {field: of_saga or field for field, of_saga in fields.items()}
    if not names:
        raise DefinitionError(f"awaits {event.__name__}: say with `by` which field it has in common with its saga")
    if (timeout is not None and not 0 < timeout <= LONGEST) or not 0 < keep <= LONGEST:
        raise DefinitionError(f"awaits {event.__name__}: timeout and keep are positive, {LONGEST:.0f} s at most")
    if early not in list(Early):
        raise DefinitionError(f"awaits {event.__name__}: early is one of {', '.join(Early)}, not {early!r}")
    return lambda function: Wait(function, event, by=names, timeout=timeout, early=Early(early), keep=keep)


def delay(function: Callable[..., Any]) -> Delay:
    """Declare a part of the flow that lets time pass: a method that returns seconds or a `timedelta`."""
    return Delay(function)


def seconds_of(answer: object) -> float:
    """Return the seconds that the method of a delay asks for.

    Raises:
        ValueError: it is none, or longer than ten years.
    """
    seconds = answer.total_seconds() if isinstance(answer, timedelta) else answer
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST:
        raise ValueError(f"it must return a number of seconds from 0 to {LONGEST:.0f}, or a timedelta, not {answer!r}")
    return float(seconds)
