"""The parts of a life cycle: transitions with who may take them, and states with what happens by deadline. Pure."""

from collections.abc import Callable, Iterable
from typing import Any

from coordinator.steps import LONGEST, Hook
from events.errors import DefinitionError

Names = str | Iterable[str]


class Transition(Hook):
    """A way from some states to another one: who may take it, what must hold, what is said. Made by `@transition`.

    Attributes:
        sources: the states that it leads out of; none for the one that begins a life cycle.
        to: the state that it leads to.
        roles: who has one of them may take it.
        by: the field that names the one person who may.
        four_eyes: fields and transitions; whom they name, and who took them, may not take this one.
        approvals: how many different persons must take it until it happens.
        comment: whether a comment must be given.
        edits: the fields that may be changed with it.
        escalates: whether it is open to whom its state is escalated to.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        sources: tuple[str, ...],
        to: str,
        *,
        roles: Names,
        by: str | None,
        four_eyes: Names,
        approvals: int,
        comment: bool,
        edits: Names,
        escalates: bool,
    ) -> None:
        super().__init__(function)
        self.sources = sources
        self.to = to
        self.roles = frozenset(_names(roles))
        self.by = by
        self.four_eyes = _names(four_eyes)
        self.approvals = approvals
        self.comment = comment
        self.edits = frozenset(_names(edits))
        self.escalates = escalates
        self.on_guard: Hook | None = None

    def guard(self, function: Callable[..., bool | str]) -> Hook:
        """Declare the method that says whether the transition is possible: True, or why not in words."""
        if self.on_guard is not None:
            raise DefinitionError(f"{self.name}: {self.on_guard.name} and {function.__name__} are both its guard")
        self.on_guard = Hook(function)
        return self.on_guard


class Deadlines(Hook):
    """What happens to an entity that stays in a state for too long. Made by `@deadlines`. Times are in seconds.

    Attributes:
        state: the state.
        remind_after: from entering the state to the first reminder,
        every: and from one to the next; None for a single one.
        escalate_after: from entering the state to its escalation.
        escalate_to: the role, or the field that names the person, that may then take every transition out of the state
            that is not one person's, unless it says `escalates=False`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        state: str,
        *,
        remind_after: float | None,
        every: float | None,
        escalate_after: float | None,
        escalate_to: str | None,
    ) -> None:
        super().__init__(function)
        self.state = state
        self.remind_after = remind_after
        self.every = every
        self.escalate_after = escalate_after
        self.escalate_to = escalate_to
        times = [time for time in (remind_after, every, escalate_after) if time is not None]
        if not times or not all(0 < time <= LONGEST for time in times):
            raise DefinitionError(
                f"{self.name}: give remind_after, escalate_after or both; positive, {LONGEST:.0f} s at most"
            )
        if every is not None and remind_after is None:
            raise DefinitionError(f"{self.name}: `every` is counted from `remind_after`; give that, too")
        if (escalate_after is None) != (escalate_to is None):
            raise DefinitionError(f"{self.name}: escalate_after and escalate_to belong together")


def transition(
    *sources: str,
    to: str,
    roles: Names,
    by: str | None = None,
    four_eyes: Names = (),
    approvals: int = 1,
    comment: bool = False,
    edits: Names = (),
    escalates: bool = True,
) -> Callable[[Callable[..., Any]], Transition]:
    """Declare a transition: a method that takes the `Act` and returns the event to publish with it, or None.

    The method is called once the transition happens, and sees the fields as they are then.

    Args:
        sources: the states that it leads out of; without any, it is the one that begins the life cycle.
        to: the state that it leads to; entering a state begins its deadlines and its votes anew.
        roles: who has one of them may take it.
        by: the field that names the one person who may, who needs the role as well.
        four_eyes: whom these fields name, and whoever took these transitions before, may not take this one; nor may
            their delegates, nor may they as somebody's delegate.
        approvals: how many different persons must take it until it happens; each is a vote until then.
        comment: whether a comment must be given.
        edits: the fields that may be changed with it.
        escalates: whether an escalation opens it to another role or person; False for what only its own roles may do.
    """
    return lambda function: Transition(
        function,
        sources,
        to,
        roles=roles,
        by=by,
        four_eyes=four_eyes,
        approvals=approvals,
        comment=comment,
        edits=edits,
        escalates=escalates,
    )


def deadlines(
    state: str,
    *,
    remind_after: float | None = None,
    every: float | None = None,
    escalate_after: float | None = None,
    escalate_to: str | None = None,
) -> Callable[[Callable[..., Any]], Deadlines]:
    """Declare what happens to an entity that stays in a state for too long. Times are in seconds.

    The method takes a `Due` and returns the event to publish as a reminder or an escalation, or None.

    Args:
        state: the state.
        remind_after: from entering the state to the first reminder.
        every: from one reminder to the next; by default there is a single one.
        escalate_after: from entering the state to its escalation.
        escalate_to: the role, or the field that names the person, that may then take every transition out of the state
            that is not one person's, unless it says `escalates=False`.

    Raises:
        DefinitionError: the times make no sense.
    """
    return lambda function: Deadlines(
        function,
        state,
        remind_after=remind_after,
        every=every,
        escalate_after=escalate_after,
        escalate_to=escalate_to,
    )


def _names(given: Names) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
