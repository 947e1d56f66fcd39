"""A circuit breaker: who sees a dependency fail again and again leaves it alone for a while.

The states are those of Nygard, "Release It!" (2nd edition, chapter 5): closed while calls go through, open while
none does, half-open while a single one tries. `step` is the whole of it, and pure; `Circuit` keeps a state.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from events.clock import Clock
from events.errors import DefinitionError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Breaker:
    """The policy of one dependency; handlers that name it share its state. Times are in seconds.

    Attributes:
        name: the dependency.
        share: it opens when this share of the last tries has failed,
        minimum: and there were at least so many,
        window: of which the last so many count. A message that fails again and again counts once.
        open_for: how long it is open at first; twice as long after each single try that fails,
        most: but no longer than this.
        on: the errors that speak of the dependency; after any other error it has answered.
    """

    name: str
    share: float = 0.5
    minimum: int = 10
    window: int = 20
    open_for: float = 5.0
    most: float = 60.0
    on: tuple[type[Exception], ...] = (Exception,)

    def __post_init__(self) -> None:
        if not self.name or not 0 < self.share <= 1:
            raise DefinitionError(f"{self}: it needs a name, and a share above 0 and up to 1")
        if not 1 <= self.minimum <= self.window:
            raise DefinitionError(f"{self}: the minimum counts from 1, and is not above the window")
        if not 0 < self.open_for <= self.most:
            raise DefinitionError(f"{self}: times are positive, and open_for is not above most")


class Phase(StrEnum):
    """How far a breaker lets calls through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Signal(StrEnum):
    """What a breaker is told."""

    SUCCEEDED = "a call was answered"
    FAILED = "a call was not"
    PROBE = "the single try begins"
    ABANDONED = "the single try did not take place after all"
    TICK = "time has passed"


@dataclass(frozen=True, slots=True)
class State:
    """A breaker at a moment.

    Attributes:
        phase: how far calls go through.
        tries: how many of the last ones are known, up to the policy's window.
        failed: which of these have failed: a bit each, the last one lowest.
        until: the end of being open, on a monotonic clock.
        failed_probes: single tries that have failed in a row.
        probing: whether a single try is under way.
    """

    phase: Phase = Phase.CLOSED
    tries: int = 0
    failed: int = 0
    until: float = 0.0
    failed_probes: int = 0
    probing: bool = False

    @property
    def failures(self) -> int:
        """How many of the last tries have failed."""
        return self.failed.bit_count()


def step(policy: Breaker, state: State, signal: Signal, now: float) -> State:
    """Return the state that follows from `signal`."""
    match state.phase:
        case Phase.CLOSED:
            return _closed(policy, state, signal, now)
        case Phase.OPEN:  # what was under way when it opened says nothing new
            return replace(state, phase=Phase.HALF_OPEN, probing=False) if now >= state.until else state
        case Phase.HALF_OPEN:
            return _half_open(policy, state, signal, now)


def _closed(policy: Breaker, state: State, signal: Signal, now: float) -> State:
    if signal not in (Signal.SUCCEEDED, Signal.FAILED):
        return state
    if signal is Signal.SUCCEEDED and not state.failed and state.tries == policy.window:
        return state
    failed = (state.failed << 1 | (signal is Signal.FAILED)) & ((1 << policy.window) - 1)
    state = replace(state, tries=min(state.tries + 1, policy.window), failed=failed)
    if signal is Signal.FAILED and state.tries >= policy.minimum and state.failures >= policy.share * state.tries:
        return replace(state, phase=Phase.OPEN, until=now + policy.open_for)
    return state


def _half_open(policy: Breaker, state: State, signal: Signal, now: float) -> State:
    match signal:
        case Signal.PROBE:
            return replace(state, probing=True)
        case Signal.ABANDONED:
            return replace(state, probing=False)
        case Signal.SUCCEEDED:
            return State()
        case Signal.FAILED:
            failed = state.failed_probes + 1
            pause = min(policy.most, policy.open_for * 2.0 ** min(failed, 32))
            return replace(state, phase=Phase.OPEN, until=now + pause, failed_probes=failed, probing=False)
        case Signal.TICK:
            return state


class Circuit:
    """A breaker at work in one process.

    Args:
        policy: when it opens.
        clock: measures its times.
    """

    def __init__(self, policy: Breaker, clock: Clock) -> None:
        self.policy = policy
        self.state = State()
        self._clock = clock
        self._failing: deque[str] = deque(maxlen=policy.window)  # messages whose failures have counted
        self._listeners: list[Callable[[], None]] = []

    def listen(self, changed: Callable[[], None]) -> None:
        """Call `changed` after each change of the phase, and when a single try begins or is abandoned."""
        self._listeners.append(changed)

    @property
    def is_closed(self) -> bool:
        """Whether calls go through."""
        return self.state.phase is Phase.CLOSED

    @property
    def wants_probe(self) -> bool:
        """Whether a single call shall try."""
        return self.state.phase is Phase.HALF_OPEN and not self.state.probing

    def tell(self, signal: Signal) -> None:
        """Take in a signal."""
        before, self.state = self.state, step(self.policy, self.state, signal, self._clock.monotonic())
        phase = self.state.phase
        if phase is not before.phase:
            self._log_change(before)
        if (phase, self.state.probing) != (before.phase, before.probing):
            for changed in self._listeners:
                changed()

    def _log_change(self, before: State) -> None:
        phase = self.state.phase
        if phase is Phase.CLOSED:
            self._failing.clear()
        level = logging.WARNING if phase is Phase.OPEN else logging.INFO
        logger.log(
            level,
            "the breaker of %s is %s now (%d of %d tries had failed)",
            self.policy.name,
            phase.value,
            before.failures,
            before.tries,
            extra={"action": "breaker.changed", "breaker": self.policy.name, "phase": phase.value},
        )

    def succeeded(self) -> None:
        """A call was answered, in whatever way."""
        self.tell(Signal.SUCCEEDED)

    def failed(self, error: BaseException, message: str) -> bool:
        """A call for `message` has failed. Return whether that is an attempt of its own.

        It is not if the breaker has opened since the call began: the cause is known then. The single try of a
        half-open breaker is one: without that a message that only ever fails itself would be tried for ever.
        """
        if not isinstance(error, self.policy.on):
            self.tell(Signal.SUCCEEDED)
            return True
        if self.state.phase is Phase.OPEN:
            return False
        if self.is_closed:
            if message in self._failing:
                return True
            self._failing.append(message)
        self.tell(Signal.FAILED)
        return True
