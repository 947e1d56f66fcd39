"""The retry ladder: quick tries in process, then longer and longer waits, then no more. Pure.

Where it comes from: Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), whose full jitter
spreads what failed together; the two stages are NServiceBus's immediate and delayed retries.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from math import isfinite, isnan
from typing import Literal

from events.errors import DefinitionError, RejectedError
from events.ids import Random

_QUICK_FIRST = 0.05
_MOST = 10 * 366 * 86_400.0  # seconds: ten years
_MOST_TRIES = 1_000_000
_QUICK_MOST = 4  # with the bounds 0.05, 0.1, 0.2 and 0.4 s a message is held for less than a second


@dataclass(frozen=True, slots=True)
class Retry:
    """How often a technical failure is tried again, and when. Times are in seconds.

    The first `quick` failures are followed by another try in process, after a few hundredths of a second. After the
    others the message waits in the database: up to `first` seconds, then up to `factor` times as long as before,
    `most` seconds at most. When `attempts` tries have failed, or the next would begin later than `budget` seconds
    after the first, the message becomes a dead letter.

    Attributes:
        attempts: tries in all, the first one and those in process included.
        quick: failures that are followed by another try in process; 4 at most.
        first: upper bound of the first longer wait.
        factor: by what each further bound is larger.
        most: the largest bound.
        budget: from the first try to the last possible one.
        jitter: `full` draws each wait between nothing and its bound, `none` takes the bound.
        never: classes of errors after which there is no further try.
        crashes: how often a process may end while it runs the message; then it is a dead letter.
    """

    attempts: int = 8
    quick: int = 2
    first: float = 1.0
    factor: float = 3.0
    most: float = 120.0
    budget: float = 900.0
    jitter: Literal["full", "none"] = "full"
    never: tuple[type[Exception], ...] = ()
    crashes: int = 3

    def __post_init__(self) -> None:
        if not all(isfinite(time) and time <= _MOST for time in (self.first, self.factor, self.most, self.budget)):
            raise DefinitionError(f"{self}: times and the factor are numbers, {_MOST:.0f} at most")
        if self.attempts > _MOST_TRIES or self.crashes > _MOST_TRIES:
            raise DefinitionError(f"{self}: attempts and crashes are {_MOST_TRIES} at most")
        if self.attempts < 1 or self.crashes < 1 or not 0 <= self.quick <= _QUICK_MOST:
            raise DefinitionError(f"{self}: attempts and crashes count from 1, quick goes from 0 to {_QUICK_MOST}")
        if self.first < 0 or self.factor < 1 or self.most < 0 or self.budget < 0:
            raise DefinitionError(f"{self}: the factor is at least 1, times are not negative")
        if self.jitter not in ("full", "none"):
            raise DefinitionError(f"{self}: jitter is full or none")

    def bound(self, attempt: int) -> float:
        """Return the longest wait after the failure of the given attempt."""
        if attempt <= self.quick:
            return float(_QUICK_FIRST * 2 ** (attempt - 1))
        try:
            return min(self.most, self.first * self.factor ** (attempt - self.quick - 1))
        except OverflowError:
            return self.most


@dataclass(frozen=True, slots=True)
class Again:
    """There is another try: after `wait` seconds, in process or from the database."""

    wait: float
    in_process: bool


@dataclass(frozen=True, slots=True)
class GiveUp:
    """There is none; `why` says so in words."""

    why: str


Verdict = Again | GiveUp


@dataclass(slots=True)
class Ladder:
    """The tries of one message.

    Attributes:
        policy: how far it goes.
        attempt: the number of the try that runs, over all processes and redeliveries.
        verdict: what follows from the last failure.
    """

    policy: Retry
    attempt: int = 1
    verdict: Verdict = field(default=GiveUp("it was not tried"))

    def failed(self, error: BaseException, *, elapsed: float, random: Random) -> Verdict:
        """Take in a failure, `elapsed` seconds after the begin of the first try; return what follows."""
        self.verdict = self._judge(error, elapsed, random)
        return self.verdict

    def spare(self, random: Random) -> Verdict:
        """Take back the try that has failed: its cause is known, and nobody shall burn attempts on it."""
        self.attempt -= 1
        self.verdict = Again(random.uniform(0, self.policy.first), in_process=False)
        return self.verdict

    def _judge(self, error: BaseException, elapsed: float, random: Random) -> Verdict:
        policy = self.policy
        if isinstance(error, (*policy.never, DefinitionError, RejectedError)):
            return GiveUp(f"{type(error).__name__} is never tried again")
        if self.attempt >= policy.attempts:
            return GiveUp(f"all {policy.attempts} attempts have failed")
        bound = policy.bound(self.attempt)
        wait = bound if policy.jitter == "none" else random.uniform(0, bound)
        hint = hint_of(error)
        if hint is not None:
            wait = hint + random.uniform(0, policy.first)  # others were told the same: not all at once
        if elapsed + wait > policy.budget:
            return GiveUp(f"the next try would begin later than {policy.budget:g} s after the first")
        return Again(wait, in_process=hint is None and self.attempt <= policy.quick)


def hint_of(error: BaseException) -> float | None:
    """Return the seconds that an error asks to wait, by an attribute `retry_after`: a number or a `timedelta`."""
    hint = getattr(error, "retry_after", None)
    if isinstance(hint, timedelta):
        return max(0.0, hint.total_seconds())
    if isinstance(hint, int | float) and not isinstance(hint, bool) and not isnan(hint):
        return max(0.0, float(hint))
    return None
