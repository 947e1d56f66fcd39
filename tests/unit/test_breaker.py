"""A circuit breaker: what follows from which signal."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.errors import DefinitionError
from handlers.breaker import Breaker, Circuit, Phase, Signal, State, step
from tests.support.flows import ManualClock

POLICY = Breaker("bank", share=0.5, minimum=4, window=8, open_for=5, most=20)
OPEN = State(Phase.OPEN, until=10)
HALF_OPEN = State(Phase.HALF_OPEN)
SUCCEEDED, FAILED, PROBE, ABANDONED, TICK = Signal


def after(state: State, *signals: Signal, now: float = 0) -> State:
    for signal in signals:
        state = step(POLICY, state, signal, now)
    return state


@pytest.mark.parametrize(
    "policy",
    [
        {"name": ""},
        {"share": 0},
        {"share": 1.1},
        {"minimum": 0},
        {"minimum": 5, "window": 4},
        {"open_for": 0},
        {"open_for": 61},
    ],
)
def test_a_policy_that_cannot_work_is_refused(policy: dict[str, object]) -> None:
    with pytest.raises(DefinitionError, match="Breaker"):
        Breaker(**{"name": "bank", **policy})  # type: ignore[arg-type]  # that is the point


def test_it_opens_when_enough_of_the_last_tries_have_failed() -> None:
    assert after(State(), FAILED, FAILED, FAILED).phase is Phase.CLOSED, "three are fewer than the minimum"
    state = after(State(), SUCCEEDED, FAILED, SUCCEEDED, FAILED, now=7)
    assert (state.phase, state.until, state.failures, state.tries) == (Phase.OPEN, 12, 2, 4)


def test_a_success_never_opens_it() -> None:
    assert after(State(), FAILED, FAILED, FAILED, SUCCEEDED).phase is Phase.CLOSED


def test_only_the_last_tries_count_however_long_it_had_worked() -> None:
    """A busy handler must not have to fail for as long as it had worked."""
    state = after(State(), *[SUCCEEDED] * 1000)
    assert after(state, *[FAILED] * 3).phase is Phase.CLOSED
    assert after(state, *[FAILED] * 4).phase is Phase.OPEN


def test_failures_that_are_long_past_do_not_count() -> None:
    state = after(State(), FAILED, FAILED, FAILED, *[SUCCEEDED] * 8)
    assert state.failures == 0
    assert after(state, FAILED, FAILED, FAILED).phase is Phase.CLOSED


@pytest.mark.parametrize("signal", Signal)
def test_while_it_is_open_nothing_changes_until_its_time_is_over(signal: Signal) -> None:
    assert after(OPEN, signal, now=9.9) == OPEN
    assert after(OPEN, signal, now=10).phase is Phase.HALF_OPEN


def test_half_open_lets_one_try_and_closes_when_it_is_answered() -> None:
    state = after(HALF_OPEN, PROBE)
    assert state.probing
    assert after(state, TICK, now=1000) == state
    assert after(state, SUCCEEDED) == State()


def test_a_single_try_that_fails_opens_it_for_twice_as_long_up_to_a_bound() -> None:
    state, waits = HALF_OPEN, []
    for _ in range(4):
        state = after(state, PROBE, FAILED, now=100)
        assert state.phase is Phase.OPEN
        waits.append(state.until - 100)
        state = after(state, TICK, now=state.until)
    assert waits == [10, 20, 20, 20]


def test_a_single_try_that_did_not_take_place_leaves_the_place_to_another() -> None:
    assert after(HALF_OPEN, PROBE, ABANDONED) == HALF_OPEN


@given(st.lists(st.tuples(st.sampled_from(list(Signal)), st.floats(0, 10)), max_size=60))
def test_whatever_happens_it_lets_nobody_through_too_early_and_only_one_at_a_time(
    signals: list[tuple[Signal, float]],
) -> None:
    state, now = State(), 0.0
    for signal, passed in signals:
        now += passed
        before, state = state, step(POLICY, state, signal, now)
        if before.phase is Phase.OPEN:
            assert state.phase is (Phase.HALF_OPEN if now >= before.until else Phase.OPEN)
            assert not state.probing
        if before.phase is Phase.CLOSED and state.phase is Phase.OPEN:
            assert signal is FAILED
        assert state.phase is not Phase.CLOSED or not state.probing
        assert state.failures <= state.tries <= POLICY.window


class BankError(Exception):
    """What the bank is blamed for."""


def circuit() -> tuple[Circuit, ManualClock]:
    clock = ManualClock()
    return Circuit(Breaker("bank", minimum=2, window=4, on=(BankError,)), clock), clock


def test_a_circuit_tells_who_listens_and_writes_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    opened, clock = circuit()
    told: list[Phase] = []
    opened.listen(lambda: told.append(opened.state.phase))
    assert [opened.failed(BankError(), str(n)) for n in range(3)] == [True, True, False], "attempts, until it is known"
    clock.advance(5)
    opened.tell(Signal.TICK)
    assert opened.wants_probe
    opened.tell(Signal.PROBE)
    assert not opened.wants_probe
    opened.succeeded()
    assert opened.is_closed
    assert told == [Phase.OPEN, Phase.HALF_OPEN, Phase.HALF_OPEN, Phase.CLOSED], "also when the single try begins"
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" (")[0] for line in lines] == [
        "the breaker of bank is open now",
        "the breaker of bank is half-open now",
        "the breaker of bank is closed now",
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_an_error_that_does_not_speak_of_the_dependency_is_an_answer() -> None:
    closed, _ = circuit()
    assert all(closed.failed(ValueError(), str(n)) for n in range(20))
    assert closed.is_closed
    assert closed.state.failures == 0


def test_a_message_that_fails_again_and_again_says_little_of_the_dependency() -> None:
    """A few broken cards in a quiet hour once opened the breaker of all others."""
    closed, _ = circuit()
    assert all(closed.failed(BankError(), "a broken card") for _ in range(20))
    assert closed.is_closed
    assert closed.failed(BankError(), "another")
    assert not closed.is_closed


def test_the_single_try_is_an_attempt_of_its_message() -> None:
    """Without that a message that only ever fails itself would be tried for ever, and nothing else."""
    opened, clock = circuit()
    opened.failed(BankError(), "1")
    opened.failed(BankError(), "2")
    clock.advance(5)
    opened.tell(Signal.TICK)
    opened.tell(Signal.PROBE)
    assert opened.failed(BankError(), "1")
    assert opened.state.phase is Phase.OPEN
    assert not opened.failed(BankError(), "3"), "it began before"
