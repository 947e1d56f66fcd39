"""An operator says how a step has really ended: the saga goes on from there, and what contradicts it is refused."""

from typing import Self

import pytest

from coordinator import Saga, parallel, sequence, starts_on, step
from coordinator.acts import NotPossibleError
from coordinator.decision import Resolution, Verb
from coordinator.instance import Status, StepStatus
from coordinator.testing import SagaRun
from events import Command, Event
from events.envelope import Direction, Result
from events.message import Reply
from tests.support.trips import booking, names, run


class Wanted(Event):
    order: str


class Charge(Command):
    order: str


class Refund(Command):
    order: str
    charge: str | None


class Deliver(Command):
    order: str


class Charged(Reply):
    charge: str
    amount: int


class Declined(Event):
    reason: str


class Order(Saga):
    order: str
    charge: str | None = None
    refusal: str | None = None

    @starts_on(Wanted)
    @classmethod
    def wanted(cls, event: Wanted) -> Self:
        return cls(order=event.order)

    @step(timeout=10)
    def pay(self) -> Charge:
        return Charge(order=self.order)

    @pay.succeeded
    def paid(self, outcome: Charged) -> None:
        self.charge = outcome.charge

    @pay.declined
    def refused(self, outcome: Declined) -> None:
        self.refusal = outcome.reason

    @pay.compensation
    def refund(self) -> Refund:
        return Refund(order=self.order, charge=self.charge)

    @step
    def deliver(self) -> Deliver:
        return Deliver(order=self.order)

    flow = sequence(pay, deliver)


def order() -> SagaRun:
    return SagaRun(Order, Wanted(order="o-1"))


def resolve(run: SagaRun, step: str, resolution: Resolution, **data: object) -> SagaRun:
    return run.acts(Verb.RESOLVE, step, resolution=resolution, data=data)


def stuck_forth() -> SagaRun:
    """Two steps past the pivot: one was declined, nobody knows of the other."""
    after = parallel(booking("b", undone=False), booking("c", undone=False))
    trip = run(sequence(booking("pivot", undone=False, pivot=True), after)).succeeds().declines("no", step="b")
    return trip.declines("neither", step="c")


def stuck_back() -> SagaRun:
    """b could not be undone; a was."""
    trip = run(sequence(booking("a"), booking("b"), booking("c")))
    return trip.succeeds().succeeds().declines("no").fails().succeeds()


def test_an_awaited_step_succeeds_with_the_data_that_its_handler_would_have_sent() -> None:
    resolved = resolve(order(), "pay", Resolution.SUCCEEDED, charge="c-1", amount=7)
    assert (resolved.instance.state["charge"], resolved.sent) == ("c-1", [Deliver(order="o-1")])
    entry = resolved.last.entry
    assert (entry.kind, entry.step, entry.direction, entry.attempt, entry.result, entry.actor, entry.why) == (
        "resolve",
        "pay",
        Direction.DO,
        1,
        Result.SUCCEEDED,
        "ada",
        "a test",
    )


def test_an_awaited_step_is_declined_and_the_saga_turns_back() -> None:
    resolved = resolve(order(), "pay", Resolution.DECLINED, reason="the card was stolen")
    assert resolved.status is Status.COMPENSATED
    assert resolved.instance.reason == "pay declined: ada: a test"
    assert resolved.instance.state["refusal"] == "the card was stolen"
    assert resolved.sent == []


def test_an_awaited_step_has_failed_and_is_undone_in_case_it_was_done() -> None:
    resolved = resolve(order(), "pay", Resolution.FAILED)
    assert (resolved.status, resolved.sent) == (Status.COMPENSATING, [Refund(order="o-1", charge=None)])


def test_a_success_that_comes_after_a_person_said_no_is_undone() -> None:
    """Who looks from outside may err: the money is given back."""
    resolved = resolve(order(), "pay", Resolution.DECLINED, reason="no trace of it at the bank")
    resolved.replies("pay", Direction.DO, Result.SUCCEEDED, Charged(charge="c-9", amount=7))
    assert resolved.status is Status.COMPENSATING
    assert resolved.sent == [Refund(order="o-1", charge="c-9")]
    assert resolved.succeeds().status is Status.COMPENSATED


def test_what_was_done_anew_after_a_person_said_no_is_not_undone_when_its_answer_comes_twice() -> None:
    trip = run(sequence(booking("pivot", undone=False, pivot=True), booking("after")))
    resolve(trip.succeeds(), "after", Resolution.DECLINED).acts(Verb.RETRY, "after").succeeds()
    trip.replies("after", Direction.DO, Result.SUCCEEDED, attempt=2)
    assert (trip.status, trip.last.entry.kind) == (Status.COMPLETED, "late_reply")


def test_an_answer_that_comes_after_the_same_was_said_changes_nothing() -> None:
    resolved = resolve(order(), "pay", Resolution.SUCCEEDED, charge="c-1", amount=7)
    resolved.replies("pay", Direction.DO, Result.SUCCEEDED, Charged(charge="c-2", amount=7))
    assert (resolved.last.entry.kind, resolved.instance.state["charge"]) == ("late_reply", "c-1")


def test_what_nobody_knew_of_is_undone_once_more_with_what_is_known_now() -> None:
    run = order().gives_no_answer()
    assert run.sent == [Refund(order="o-1", charge=None)]
    resolved = resolve(run, "pay", Resolution.SUCCEEDED, charge="c-1", amount=7)
    assert resolved.sent == [Refund(order="o-1", charge="c-1")]
    assert resolved.last.requests[0].attempt == 2
    assert resolved.succeeds().status is Status.COMPENSATED


def test_what_was_never_done_is_not_undone_any_more() -> None:
    run = order().gives_no_answer().fails()
    assert run.status is Status.NEEDS_ATTENTION
    resolved = resolve(run, "pay", Resolution.DECLINED, reason="the bank never heard of it")
    assert (resolved.status, resolved.instance.steps["pay"].status) == (Status.COMPENSATED, StepStatus.DECLINED)


@pytest.mark.parametrize("at", ["undoing", "failed"])
def test_what_was_undone_by_hand_counts_as_undone(at: str) -> None:
    run = order().gives_no_answer()
    if at == "failed":
        run.fails()
    resolved = resolve(run, "pay", Resolution.UNDONE)
    assert (resolved.status, resolved.last.entry.direction) == (Status.COMPENSATED, Direction.UNDO)


def test_what_waits_for_its_turn_may_be_undone_by_hand_before() -> None:
    trip = run(sequence(booking("a"), booking("b"))).succeeds().gives_no_answer()
    assert names(trip.sent) == ["cancel b"]
    assert resolve(trip, "a", Resolution.UNDONE).succeeds().status is Status.COMPENSATED


def test_of_two_stuck_steps_both_must_go_on_before_the_saga_does() -> None:
    trip = resolve(stuck_forth(), "b", Resolution.SUCCEEDED)
    assert trip.status is Status.NEEDS_ATTENTION, "c is still stuck"
    assert trip.instance.reason is not None
    assert trip.instance.due_at is None
    done = resolve(trip, "c", Resolution.SUCCEEDED)
    assert (done.status, done.instance.reason) == (Status.COMPLETED, None)


@pytest.mark.parametrize("verb", [Verb.SKIP, Verb.RETRY])
def test_a_saga_is_not_said_to_run_while_another_step_is_stuck(verb: Verb) -> None:
    """It would have waited for ever: nothing was outstanding, and nobody was called."""
    trip = stuck_forth().acts(verb, "b")
    if verb is Verb.RETRY:
        assert trip.status is Status.RUNNING, "an answer is outstanding"
        trip.succeeds()
    assert trip.status is Status.NEEDS_ATTENTION
    assert trip.acts(Verb.SKIP, "c").status is Status.COMPLETED


def test_a_pivot_that_nobody_knew_of_was_declined_and_the_saga_turns_back() -> None:
    trip = run(sequence(booking("a"), booking("pivot", undone=False, pivot=True))).succeeds().fails()
    assert names(resolve(trip, "pivot", Resolution.DECLINED).sent) == ["cancel a"]
    assert trip.succeeds().status is Status.COMPENSATED


def test_a_pivot_that_nobody_knew_of_succeeded_and_the_saga_goes_on() -> None:
    trip = run(sequence(booking("pivot", undone=False, pivot=True), booking("after", undone=False))).fails()
    assert names(resolve(trip, "pivot", Resolution.SUCCEEDED).sent) == ["book after"]


@pytest.mark.parametrize(
    ("resolution", "data", "said"),
    [
        (Resolution.SUCCEEDED, {}, "pay succeeded with charged: Charged: charge: Field required; amount: Field"),
        (Resolution.SUCCEEDED, {"charge": "c", "amount": "much"}, "amount: Input should be a valid integer"),
        (
            Resolution.SUCCEEDED,
            {"charge": "c", "amount": 1, "chrage": "d"},
            "charged has no chrage; it has: charge, am",
        ),
        (Resolution.FAILED, {"reason": "x"}, "pay takes no data where it has failed; leave it out"),
        (Resolution.UNDONE, {}, "step pay is running, and the saga running: only what is being undone can be"),
        (None, {}, "say how pay has ended: succeeded, declined, failed, undone"),
    ],
)
def test_data_that_the_handler_would_not_have_sent_is_refused(
    resolution: Resolution | None, data: dict[str, object], said: str
) -> None:
    run = order()
    before = run.instance
    with pytest.raises(NotPossibleError, match=said):
        run.acts(Verb.RESOLVE, "pay", resolution=resolution, data=data)
    assert run.instance == before


def test_what_contradicts_what_is_known_is_refused() -> None:
    trip = run(sequence(booking("a"), booking("b"))).succeeds()
    for resolution in (Resolution.SUCCEEDED, Resolution.DECLINED, Resolution.FAILED):
        with pytest.raises(
            NotPossibleError, match=f"a is succeeded, and the saga running: it cannot have {resolution}"
        ):
            resolve(trip, "a", resolution)
    with pytest.raises(NotPossibleError, match="the saga has begun no step 'x'"):
        resolve(trip, "x", Resolution.SUCCEEDED)
    with pytest.raises(NotPossibleError, match="it is at revision 2, not 1; look at it again"):
        trip.acts(Verb.RESOLVE, "b", resolution=Resolution.SUCCEEDED, revision=1)
    with pytest.raises(NotPossibleError, match="step a is undone, and the saga needs_attention"):
        resolve(stuck_back(), "a", Resolution.DECLINED)
