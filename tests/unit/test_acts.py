"""What an operator can do, where, and what is refused."""

from datetime import timedelta
from typing import Any

import pytest

from coordinator.acts import NotPossibleError
from coordinator.decide import give_up
from coordinator.decision import Verb
from coordinator.flow import each, parallel, sequence, when
from coordinator.instance import Status, StepStatus
from coordinator.steps import compensated, completed, step
from coordinator.testing import SagaRun
from events.envelope import Direction, Result
from tests.support.trips import Book, TripWanted, booking, names, run, saga


def stuck_back() -> SagaRun:
    """b could not be undone; a was."""
    trip = run(sequence(booking("a"), booking("b"), booking("c")))
    return trip.succeeds().succeeds().declines("no").fails().succeeds()


def stuck_forth() -> SagaRun:
    """What comes after the pivot was declined."""
    trip = run(sequence(booking("a"), booking("pivot", undone=False, pivot=True), booking("after", undone=False)))
    return trip.succeeds().succeeds().declines("no")


def test_every_act_is_in_the_history_with_who_and_why() -> None:
    entry = stuck_back().acts(Verb.SKIP, "b").last.entry
    assert (entry.kind, entry.step, entry.actor, entry.why) == ("skip", "b", "ada", "a test")


def test_a_running_saga_is_cancelled_and_undone() -> None:
    trip = run(sequence(booking("a"), booking("b"))).succeeds().acts(Verb.CANCEL)
    assert (trip.status, trip.reason, names(trip.sent)) == (Status.COMPENSATING, "cancelled by ada: a test", [])
    assert names(trip.succeeds().sent) == ["cancel b"], "its answer was awaited"
    assert trip.succeeds().succeeds().status is Status.COMPENSATED


def test_a_cancel_that_races_the_last_reply_comes_first_or_is_refused() -> None:
    first = run(sequence(booking("a"))).acts(Verb.CANCEL).succeeds()
    assert names(first.sent) == ["cancel a"]
    late = run(sequence(booking("a"))).succeeds()
    with pytest.raises(NotPossibleError, match="only a running saga can be cancelled; this one is completed"):
        late.acts(Verb.CANCEL)


def test_a_compensation_that_failed_is_retried_as_a_new_attempt() -> None:
    trip = stuck_back()
    assert trip.status is Status.NEEDS_ATTENTION
    assert names(trip.acts(Verb.RETRY, "b").sent) == ["cancel b"]
    assert trip.last.requests[0].attempt == 2
    assert trip.succeeds().status is Status.COMPENSATED


def test_a_compensation_that_was_seen_to_by_hand_is_skipped() -> None:
    assert stuck_back().acts(Verb.SKIP, "b").status is Status.COMPENSATED


def test_compensating_tries_all_again_that_could_not_be_undone() -> None:
    trip = stuck_back().acts(Verb.COMPENSATE)
    assert (trip.status, names(trip.sent)) == (Status.COMPENSATING, ["cancel b"])
    assert run(sequence(booking("a"), booking("b"))).succeeds().acts(Verb.COMPENSATE).status is Status.COMPENSATING


def test_past_a_pivot_what_is_stuck_is_retried_or_skipped_and_never_undone() -> None:
    assert stuck_forth().status is Status.NEEDS_ATTENTION
    retried = stuck_forth().acts(Verb.RETRY, "after")
    assert (retried.status, names(retried.sent)) == (Status.RUNNING, ["book after"])
    assert retried.succeeds().status is Status.COMPLETED
    assert stuck_forth().acts(Verb.SKIP, "after").status is Status.COMPLETED
    with pytest.raises(NotPossibleError, match="its pivot has begun: there is no way back"):
        stuck_forth().acts(Verb.COMPENSATE)


@pytest.mark.parametrize("verb", [Verb.CANCEL, Verb.COMPENSATE])
def test_while_nobody_knows_of_the_pivot_there_is_no_way_back(verb: Verb) -> None:
    """The money may be taken: to undo the rest would keep it for nothing."""
    trip = run(sequence(booking("a"), booking("pivot", undone=False, pivot=True))).succeeds()
    with pytest.raises(NotPossibleError, match="its pivot has begun"):
        trip.acts(verb)
    trip.fails()
    with pytest.raises(NotPossibleError, match="its pivot has begun"):
        trip.acts(verb)
    trip.acts(Verb.RETRY, "pivot").declines("no")
    assert names(trip.sent) == ["cancel a"]


def test_what_waits_for_its_next_attempt_is_retried_now_or_skipped() -> None:
    flow = sequence(booking("pivot", undone=False, pivot=True), booking("after", undone=False))
    assert names(run(flow).fails().acts(Verb.RETRY, "pivot").sent) == ["book pivot"]
    assert names(run(flow).fails().acts(Verb.SKIP, "pivot").sent) == ["book after"]


def given_up(trip: SagaRun) -> SagaRun:
    trip.decisions.append(give_up(trip.instance, "it could not be decided on", trip.now))
    return trip


def test_a_saga_that_was_given_up_on_goes_on_when_its_step_is_retried() -> None:
    flow = sequence(booking("pivot", undone=False, pivot=True), parallel(booking("a"), booking("b")))
    trip = given_up(run(flow).succeeds()).acts(Verb.RETRY, "a")
    assert (trip.status, trip.reason, names(trip.sent)) == (Status.RUNNING, None, ["book a"])
    assert names(trip.succeeds(step="a").gives_no_answer().gives_no_answer().sent) == ["book b"], "its deadline is kept"
    assert trip.succeeds().status is Status.COMPLETED
    back = given_up(run(sequence(booking("a"), booking("b"))).succeeds().declines("no")).acts(Verb.RETRY, "a")
    assert (back.status, names(back.sent)) == (Status.COMPENSATING, ["cancel a"])
    assert back.succeeds().status is Status.COMPENSATED


def test_a_saga_that_was_given_up_on_goes_on_although_all_answers_have_come() -> None:
    trip = given_up(run(sequence(booking("a"), booking("b")))).succeeds()
    assert trip.status is Status.NEEDS_ATTENTION
    assert names(trip.acts(Verb.RETRY, "a").sent) == ["book b"]


def test_a_saga_keeps_its_deadline_while_a_person_must_look_at_it() -> None:
    trip = given_up(run(sequence(booking("a"), booking("b", timeout=9000)), deadline=100)).succeeds()
    assert (trip.status, trip.instance.due_at) == (Status.NEEDS_ATTENTION, None), "nothing happens by itself"
    trip.acts(Verb.RETRY, "a")
    assert trip.passes(99).status is Status.RUNNING
    assert trip.passes(1).status is Status.COMPENSATING
    moved = given_up(run(sequence(booking("a", timeout=9000)), deadline=100))
    moved.acts(Verb.MOVE_DEADLINE, until=moved.now + timedelta(seconds=500)).acts(Verb.RETRY, "a")
    assert moved.passes(499).status is Status.RUNNING
    assert moved.passes(1).status is Status.COMPENSATING


@pytest.fixture
def broken() -> dict[str, bool]:
    """Whether a method of a saga raises; the next release of it does not."""
    return {"method": True}


def test_past_a_pivot_items_that_could_not_be_listed_are_listed_again(broken: dict[str, bool]) -> None:
    def seats(self: Any) -> list[int]:
        assert self.trip
        assert not broken["method"]
        return [1, 2]

    def seat(self: Any, item: int) -> Book:
        assert self.trip
        return Book(what=f"seat {item}")

    trip = run(sequence(booking("pivot", undone=False, pivot=True), each(seats, step(seat)))).succeeds()
    assert trip.acts(Verb.RETRY, "seat").status is Status.NEEDS_ATTENTION
    broken["method"] = False
    trip.acts(Verb.RETRY, "seat")
    assert (trip.status, names(trip.sent)) == (Status.RUNNING, ["book seat 1", "book seat 2"])
    assert trip.succeeds(step="seat[0]").succeeds(step="seat[1]").status is Status.COMPLETED


def test_past_a_pivot_a_condition_that_could_not_be_told_is_asked_again(broken: dict[str, bool]) -> None:
    def is_wanted(self: Any) -> bool:
        assert self.trip
        assert not broken["method"]
        return True

    flow = sequence(booking("pivot", undone=False, pivot=True), when(is_wanted, booking("a")))
    trip = run(flow).succeeds()
    assert trip.acts(Verb.RETRY, "pivot").status is Status.NEEDS_ATTENTION
    broken["method"] = False
    assert names(trip.acts(Verb.RETRY, "pivot").sent) == ["book a"]
    assert trip.succeeds().status is Status.COMPLETED


def test_an_end_that_could_not_be_announced_is_announced_again(broken: dict[str, bool]) -> None:
    class Announced(saga(sequence(booking("pivot", undone=False, pivot=True)))):  # type: ignore[misc]
        @completed
        def done(self) -> TripWanted:
            assert not broken["method"]
            return TripWanted(trip=self.trip)

    trip = SagaRun(Announced, TripWanted(trip="1")).succeeds()
    assert (trip.status, trip.published) == (Status.NEEDS_ATTENTION, [])
    broken["method"] = False
    assert trip.acts(Verb.RETRY, "pivot").status is Status.COMPLETED
    assert (trip.reason, trip.published) == (None, [TripWanted(trip="1")])


def test_what_is_announced_in_the_end_has_the_first_reason(broken: dict[str, bool]) -> None:
    class Announced(saga(sequence(booking("a")))):  # type: ignore[misc]
        @compensated
        def off(self, reason: str) -> TripWanted:
            assert not broken["method"]
            return TripWanted(trip=reason)

    trip = SagaRun(Announced, TripWanted(trip="1")).declines("no")
    for verb, step_name in ((Verb.RETRY, "a"), (Verb.COMPENSATE, None)):
        assert trip.acts(verb, step_name).status is Status.NEEDS_ATTENTION
        assert (trip.reason or "").startswith("a declined: no; compensated, but off failed: off raised")
    broken["method"] = False
    assert trip.acts(Verb.RETRY, "a").status is Status.COMPENSATED
    assert (trip.reason, trip.published) == ("a declined: no", [TripWanted(trip="a declined: no")])


def test_an_outstanding_command_is_sent_again_as_it_was() -> None:
    trip = run(sequence(booking("a"), booking("b")))
    first = trip.last.requests[0]
    assert trip.acts(Verb.RETRY, "a").last.requests[0].id == first.id
    trip.succeeds(step="a").declines("no")
    undo = trip.last.requests[0]
    assert trip.acts(Verb.RETRY, "a").last.requests[0].id == undo.id


def test_a_deadline_is_moved() -> None:
    trip = run(sequence(booking("a")))
    until = trip.now + timedelta(days=2)
    assert trip.acts(Verb.MOVE_DEADLINE, "a", until=until).instance.due_at == until
    assert trip.passes(86_400).status is Status.RUNNING
    with pytest.raises(NotPossibleError, match="a time to come"):
        trip.acts(Verb.MOVE_DEADLINE, "a", until=trip.now)
    with pytest.raises(NotPossibleError, match="step a is succeeded; it has no deadline"):
        run(sequence(booking("a"))).succeeds().acts(Verb.MOVE_DEADLINE, "a", until=until)


def test_a_deadline_is_cancelled_and_the_answer_may_take_as_long_as_it_takes() -> None:
    trip = run(sequence(booking("a"))).acts(Verb.CANCEL_DEADLINE, "a")
    assert trip.instance.due_at is None
    assert trip.passes(1e6).status is Status.RUNNING
    with pytest.raises(NotPossibleError, match="step a is running; it has no deadline that could be cancelled"):
        trip.acts(Verb.CANCEL_DEADLINE, "a")
    until = trip.now + timedelta(days=2)
    assert trip.acts(Verb.MOVE_DEADLINE, "a", until=until).instance.due_at == until, "it is given a new one"
    assert trip.succeeds().status is Status.COMPLETED


def test_what_waits_for_its_next_attempt_cannot_lose_its_timer() -> None:
    trip = run(sequence(booking("pivot", undone=False, pivot=True))).fails()
    with pytest.raises(NotPossibleError, match="step pivot would never be tried again"):
        trip.acts(Verb.CANCEL_DEADLINE, "pivot")


def test_the_deadline_of_a_saga_is_moved_and_cancelled() -> None:
    trip = run(sequence(booking("a", timeout=9000)), deadline=100)
    until = trip.now + timedelta(seconds=500)
    moved = trip.acts(Verb.MOVE_DEADLINE, until=until)
    assert (moved.instance.deadline, moved.instance.due_at) == (until, until)
    assert moved.last.entry.change == {"deadline": until.isoformat()}
    assert moved.passes(499).status is Status.RUNNING
    cancelled = run(sequence(booking("a", timeout=9000)), deadline=100).acts(Verb.CANCEL_DEADLINE)
    assert (cancelled.instance.deadline, cancelled.passes(8000).status) == (None, Status.RUNNING)
    with pytest.raises(NotPossibleError, match="the saga has no deadline of its own"):
        cancelled.acts(Verb.CANCEL_DEADLINE)
    given = run(sequence(booking("a", timeout=9000))).acts(Verb.MOVE_DEADLINE, until=until)
    assert given.passes(500).status is Status.COMPENSATING, "one that had none is given one"
    with pytest.raises(NotPossibleError, match="the saga is compensating; it has no deadline of its own any more"):
        given.acts(Verb.MOVE_DEADLINE, until=given.now + timedelta(seconds=1))
    with pytest.raises(NotPossibleError, match="the saga is needs_attention and past its pivot"):
        stuck_forth().acts(Verb.CANCEL_DEADLINE)


def test_who_looked_at_an_older_revision_is_told_to_look_again() -> None:
    trip = run(sequence(booking("a"), booking("b")))
    seen = trip.instance.revision
    trip.succeeds()
    with pytest.raises(NotPossibleError, match="it is at revision 2, not 1; look at it again"):
        trip.acts(Verb.CANCEL, revision=seen)
    assert trip.acts(Verb.CANCEL, revision=2).status is Status.COMPENSATING


@pytest.mark.parametrize(
    ("verb", "step", "said"),
    [
        (Verb.RETRY, "a", "step a is undone; there is nothing to retry"),
        (Verb.SKIP, "a", "step a is undone; only what has failed for good, or waits, can be skipped"),
        (Verb.RETRY, "x", "the saga has begun no step 'x'; it has begun: a, b, c"),
        (Verb.SKIP, None, "the saga has begun no step None"),
        (Verb.CANCEL, None, "only a running saga can be cancelled"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(verb: Verb, step: str | None, said: str) -> None:
    trip = stuck_back()
    before = trip.instance
    with pytest.raises(NotPossibleError, match=said):
        trip.acts(verb, step)
    assert trip.instance == before


def test_an_answer_that_comes_after_a_skip_changes_nothing() -> None:
    trip = stuck_back().acts(Verb.SKIP, "b")
    trip.replies("b", Direction.UNDO, Result.SUCCEEDED)
    assert trip.instance.steps["b"].status is StepStatus.UNDONE
    assert trip.status is Status.COMPENSATED
