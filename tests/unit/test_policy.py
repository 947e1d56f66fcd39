"""The retry ladder: what follows from a failure."""

from datetime import timedelta
from typing import Any

import pytest

from events.errors import DefinitionError, InvalidMessageError
from handlers import Retry, RetryAfter
from handlers.policy import Again, GiveUp, Ladder, hint_of
from tests.support.flows import Longest

ERROR = ValueError("no")


def climb(policy: Retry, *errors: Exception, elapsed: float = 0) -> list[Again | GiveUp]:
    ladder = Ladder(policy)
    found = []
    for error in errors:
        found.append(ladder.failed(error, elapsed=elapsed, random=Longest()))
        ladder.attempt += 1
    return found


@pytest.mark.parametrize(
    "policy",
    [
        {"attempts": 0},
        {"crashes": 0},
        {"quick": -1},
        {"quick": 5},
        {"first": -1},
        {"factor": 0.5},
        {"most": -1},
        {"budget": -1},
        {"jitter": "some"},
    ],
)
def test_a_policy_that_cannot_work_is_refused(policy: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError, match="Retry"):
        Retry(**policy)


def test_quick_tries_come_first_and_then_waits_that_grow_up_to_a_bound() -> None:
    policy = Retry(attempts=7, quick=2, first=1, factor=3, most=20)
    assert climb(policy, *[ERROR] * 7) == [
        Again(0.05, in_process=True),
        Again(0.1, in_process=True),
        Again(1, in_process=False),
        Again(3, in_process=False),
        Again(9, in_process=False),
        Again(20, in_process=False),
        GiveUp("all 7 attempts have failed"),
    ]


def test_a_message_is_never_held_for_a_second() -> None:
    policy = Retry(attempts=10, quick=4)
    assert sum(policy.bound(attempt) for attempt in range(1, policy.quick + 1)) < 1


def test_waits_stay_at_their_bound_however_many_attempts_there_are() -> None:
    assert Retry(attempts=10_000, quick=0, first=0.1, factor=2, most=5).bound(9_999) == 5


def test_the_shipped_policy_ends_before_a_step_has_to_be_answered() -> None:
    """A step waits for 300 s unless it says otherwise: its handler should have given up by then."""
    policy = Retry()
    assert sum(policy.bound(attempt) for attempt in range(1, policy.attempts)) < 300


def test_without_jitter_a_wait_is_its_bound() -> None:
    class Nothing:
        def uniform(self, low: float, high: float) -> float:
            raise AssertionError(f"drawn between {low} and {high}")

    ladder = Ladder(Retry(quick=0, first=7, jitter="none"))
    assert ladder.failed(ERROR, elapsed=0, random=Nothing()) == Again(7, in_process=False)


def test_no_try_begins_after_the_budget_is_spent() -> None:
    policy = Retry(quick=0, first=10, budget=60)
    assert climb(policy, ERROR, elapsed=50) == [Again(10, in_process=False)]
    [verdict] = climb(policy, ERROR, elapsed=50.1)
    assert verdict == GiveUp("the next try would begin later than 60 s after the first")


def test_classes_of_errors_are_never_tried_again() -> None:
    policy = Retry(never=(ValueError,))
    assert climb(policy, UnicodeError("a kind of ValueError")) == [GiveUp("UnicodeError is never tried again")]
    assert isinstance(climb(policy, KeyError("another"))[0], Again)


@pytest.mark.parametrize("error", [DefinitionError("wrong"), InvalidMessageError("wrong")])
def test_what_another_try_cannot_mend_is_not_tried_again(error: Exception) -> None:
    assert isinstance(climb(Retry(), error)[0], GiveUp)


def test_an_error_that_says_when_to_come_again_is_obeyed_with_some_spread() -> None:
    """Others were told the same: they must not come all at once."""
    assert climb(Retry(first=2), RetryAfter(30)) == [Again(32, in_process=False)]


def test_an_error_that_asks_for_more_than_the_budget_ends_it() -> None:
    assert isinstance(climb(Retry(budget=60), RetryAfter(90))[0], GiveUp)


@pytest.mark.parametrize(
    ("hint", "seconds"),
    [(3, 3), (0.5, 0.5), (timedelta(minutes=1), 60), (-1, 0), (True, None), ("3", None), (None, None)],
)
def test_any_exception_may_carry_a_hint(hint: object, seconds: float | None) -> None:
    error = ValueError("busy")
    error.retry_after = hint  # type: ignore[attr-defined]  # what other libraries do
    assert hint_of(error) == seconds


def test_a_hint_that_is_no_number_is_none() -> None:
    error = ValueError("busy")
    error.retry_after = float("nan")  # type: ignore[attr-defined]  # what other libraries do
    assert hint_of(error) is None


def test_a_spared_try_is_not_counted() -> None:
    ladder = Ladder(Retry(quick=3, first=4), attempt=2)
    assert ladder.spare(Longest()) == Again(4, in_process=False)
    assert ladder.attempt == 1
