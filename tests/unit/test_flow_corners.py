"""What random flows have found: each of these left something done, or a saga that nobody could help."""

from dataclasses import replace
from typing import Any

import pytest

from coordinator.acts import NotPossibleError
from coordinator.decide import decide
from coordinator.decision import Happened, Recalled, Resolution, Verb
from coordinator.flow import Each, each, parallel, sequence, when
from coordinator.instance import Origin, Status
from coordinator.steps import Backoff, Step, step
from coordinator.testing import PARENT_ID
from coordinator.waits import awaits
from events.envelope import Direction, Result
from tests.support.trips import Book, Cancel, TripWanted, booking, names, run

DO, UNDO = Direction.DO, Direction.UNDO
SUCCEEDED, FAILED = Result.SUCCEEDED, Result.FAILED


def pivot() -> Step:
    return booking("pivot", undone=False, pivot=True)


def bookings(name: str, count: int, *, on_failure: str = "undo", recovery: Backoff | None = None) -> Each:
    """The same booking for several travellers."""

    def travellers(self: Any) -> list[int]:
        assert self.trip
        return list(range(count))

    def book(self: Any, item: int) -> Book:
        assert self.trip
        return Book(what=f"{name} {item}")

    def cancel(self: Any, item: int) -> Cancel:
        assert self.trip
        return Cancel(what=f"{name} {item}")

    book.__name__ = name
    made = step(recovery=recovery)(book)
    made.compensation(cancel)
    return each(travellers, made, on_failure=on_failure)


def test_what_follows_is_undone_before_branches_that_were_kept() -> None:
    kept = parallel(booking("a"), booking("b"), needed="any", stragglers="keep")
    trip = run(sequence(kept, booking("c"), booking("d"))).succeeds(step="a").succeeds(step="c")
    assert names(trip.declines("no", step="d").sent) == [], "b is under way"
    assert names(trip.succeeds(step="b").sent) == ["cancel c"]
    assert names(trip.succeeds(step="c").sent) == ["cancel b", "cancel a"]
    assert trip.succeeds(step="a").succeeds(step="b").status is Status.COMPENSATED


def test_a_straggler_in_a_branch_that_is_done_is_undone_as_well() -> None:
    inner = parallel(booking("b"), booking("c"), needed="any")
    trip = run(sequence(parallel(booking("a"), inner, needed="any"))).succeeds(step="c").declines("no", step="a")
    assert names(trip.succeeds(step="b").sent) == ["cancel b"]
    assert trip.succeeds(step="b").status is Status.COMPLETED


def test_a_late_success_in_a_branch_of_a_branch_that_was_undone_is_undone() -> None:
    inner = parallel(booking("b"), booking("c"), needed="any")
    trip = run(sequence(parallel(booking("a"), inner, needed="any"))).succeeds(step="a").gives_no_answer()
    assert trip.succeeds(step="b").succeeds(step="c").status is Status.COMPLETED
    assert names(trip.replies("b", DO, SUCCEEDED).sent) == ["cancel b"]
    assert trip.replies("b", UNDO, SUCCEEDED, attempt=2).status is Status.COMPLETED


def test_a_late_success_is_undone_although_its_compensation_waits_for_its_next_attempt() -> None:
    trip = run(sequence(booking("a", retry=Backoff(2)), booking("b"))).gives_no_answer().fails()
    assert names(trip.replies("a", DO, SUCCEEDED).sent) == ["cancel a"]
    assert trip.replies("a", UNDO, SUCCEEDED).status is Status.COMPENSATING, "that one had found nothing"
    assert trip.replies("a", UNDO, SUCCEEDED, attempt=2).status is Status.COMPENSATED


def test_nothing_is_tried_anew_in_a_branch_that_is_undone() -> None:
    trip = run(sequence(pivot(), parallel(booking("a"), booking("b"), needed="any"))).succeeds()
    assert names(trip.fails(step="a").succeeds(step="b").sent) == ["cancel a"], "it may have been done"
    assert trip.succeeds(step="a").status is Status.COMPLETED


def test_past_its_pivot_a_branch_that_is_needed_can_be_helped_on() -> None:
    trip = run(sequence(pivot(), parallel(booking("a"), booking("b"), needed="any"))).succeeds()
    trip.declines("no", step="a").declines("no", step="b")
    assert trip.status is Status.NEEDS_ATTENTION
    assert names(trip.acts(Verb.RETRY, "b").sent) == ["book b"]
    assert trip.succeeds(step="b").status is Status.COMPLETED


def test_a_late_success_of_an_item_that_was_undone_alone_wakes_the_saga() -> None:
    trip = run(sequence(bookings("seat", 2, on_failure="collect"))).succeeds(step="seat[1]")
    assert trip.fails(step="seat[0]").fails(step="seat[0]").status is Status.NEEDS_ATTENTION
    assert names(trip.replies("seat[0]", DO, SUCCEEDED).sent) == ["cancel seat 0"]
    assert trip.status is Status.RUNNING
    assert trip.succeeds().status is Status.COMPLETED


def test_past_its_pivot_a_saga_is_not_done_without_an_item_that_has_failed() -> None:
    trip = run(sequence(pivot(), bookings("seat", 2))).succeeds()
    trip.declines("no", step="seat[0]").declines("no", step="seat[1]").acts(Verb.RETRY, "seat[0]").succeeds()
    assert trip.status is Status.NEEDS_ATTENTION
    assert trip.acts(Verb.RETRY, "seat[1]").succeeds().status is Status.COMPLETED


def test_an_item_that_has_failed_is_why_a_saga_needs_attention_whichever_else_is_helped_on() -> None:
    trip = run(sequence(pivot(), bookings("seat", 3))).succeeds()
    trip.declines("no", step="seat[0]").declines("no", step="seat[1]")
    with pytest.raises(NotPossibleError, match="pivot is succeeded; there is nothing to retry"):
        trip.acts(Verb.RETRY, "pivot")
    trip.acts(Verb.RETRY, "seat[1]").succeeds(step="seat[1]").succeeds(step="seat[2]")
    assert (trip.status, trip.reason) == (Status.NEEDS_ATTENTION, "seat[0] declined: no")
    assert trip.acts(Verb.RETRY, "seat[0]").succeeds().status is Status.COMPLETED
    assert trip.reason is None


def test_a_failed_item_is_undone_while_a_part_before_it_is_busy_once_more() -> None:
    first, second = (bookings(name, 1, on_failure="collect") for name in ("first", "second"))
    trip = run(sequence(first, second)).fails(step="first[0]").succeeds(step="first[0]")
    trip.replies("first[0]", DO, SUCCEEDED)
    assert names(trip.fails(step="second[0]").sent) == ["cancel second 0"]
    assert trip.succeeds(step="second[0]").succeeds(step="first[0]").status is Status.COMPLETED


def test_failed_items_are_counted_as_long_as_they_have_failed() -> None:
    trip = run(sequence(bookings("seat", 2, on_failure="collect"))).declines("no", step="seat[0]").fails(step="seat[1]")
    fan = trip.succeeds().instance.steps["seat"].fan
    assert (trip.status, fan and fan.failed) == (Status.COMPLETED, 2)


def test_a_failed_item_of_which_an_operator_says_how_it_was_has_failed_once() -> None:
    trip = run(sequence(bookings("seat", 1, on_failure="collect"))).fails()
    fan = trip.acts(Verb.RESOLVE, "seat[0]", resolution=Resolution.DECLINED).instance.steps["seat"].fan
    assert (trip.status, fan and fan.failed) == (Status.COMPLETED, 1)


def test_what_could_not_be_undone_of_a_fan_out_is_tried_once_more_by_an_operator_who_compensates() -> None:
    trip = run(sequence(bookings("seat", 3), booking("a"))).succeeds(step="seat[0]").succeeds(step="seat[1]")
    trip.declines("no", step="seat[2]").fails(step="seat[1]").succeeds(step="seat[0]")
    assert trip.status is Status.NEEDS_ATTENTION
    sent = [command for decision in trip.acts(Verb.COMPENSATE).decisions[-2:] for command in decision.requests]
    assert [(each.step, each.direction, each.attempt) for each in sent] == [("seat[1]", UNDO, 2)]
    assert trip.succeeds().status is Status.COMPENSATED


def test_a_late_success_of_an_attempt_before_the_last_one_is_undone() -> None:
    flow = parallel(booking("a", recovery=Backoff(2)), booking("b"), needed="any")
    trip = run(sequence(pivot(), flow)).succeeds().fails(step="a").gives_no_answer().succeeds(step="b")
    assert trip.instance.steps["a"].attempt == 2
    assert trip.fails(step="a").succeeds(step="a").status is Status.COMPLETED
    assert names(trip.replies("a", DO, SUCCEEDED, attempt=1).sent) == ["cancel a"]
    assert trip.succeeds().status is Status.COMPLETED


def test_a_success_that_comes_twice_of_what_a_person_has_undone_is_not_undone_once_more() -> None:
    trip = run(sequence(booking("a"), booking("b"), booking("c"))).succeeds().succeeds().declines("no")
    trip.acts(Verb.RESOLVE, "a", resolution=Resolution.UNDONE).replies("a", DO, SUCCEEDED)
    assert trip.last.entry.kind == "late_reply"
    assert trip.succeeds(step="b").status is Status.COMPENSATED


def test_a_compensation_that_has_found_nothing_is_not_taken_for_the_one_after_it() -> None:
    trip = run(sequence(booking("a", retry=Backoff(3)), booking("b"))).gives_no_answer()
    assert names(trip.replies("a", DO, SUCCEEDED).sent) == ["cancel a"]
    assert trip.fails().replies("a", UNDO, SUCCEEDED, attempt=1).status is Status.COMPENSATING
    assert names(trip.gives_no_answer().sent) == ["cancel a"]


def test_an_item_that_fails_while_a_person_must_look_at_something_else_is_undone_alone() -> None:
    seats = bookings("seat", 2, on_failure="collect", recovery=Backoff(1))
    trip = run(sequence(pivot(), parallel(booking("a"), seats))).succeeds().declines("no", step="a")
    assert trip.status is Status.NEEDS_ATTENTION
    assert names(trip.fails(step="seat[0]").sent) == ["cancel seat 0"]
    trip.succeeds(step="seat[1]").acts(Verb.RETRY, "a").succeeds(step="a")
    assert trip.succeeds(step="seat[0]").status is Status.COMPLETED


def test_an_item_of_which_an_operator_says_that_it_was_not_done_can_be_tried_again() -> None:
    trip = run(sequence(pivot(), bookings("seat", 2, recovery=Backoff(1)))).succeeds()
    trip.succeeds(step="seat[1]").fails().acts(Verb.RESOLVE, "seat[0]", resolution=Resolution.DECLINED)
    fan = trip.instance.steps["seat"].fan
    assert (trip.status, fan and fan.failed) == (Status.NEEDS_ATTENTION, 1)
    assert trip.acts(Verb.RETRY, "seat[0]").succeeds().status is Status.COMPLETED


def test_a_condition_that_cannot_be_told_fails_its_branch_alone() -> None:
    def is_wanted(self: Any) -> bool:
        raise RuntimeError(self.trip)

    trip = run(sequence(parallel(when(is_wanted, booking("a")), booking("b"), needed="any"), booking("c")))
    assert (trip.status, names(trip.sent)) == (Status.RUNNING, ["book b"])
    assert names(trip.succeeds().sent) == ["book c"]
    assert trip.succeeds().status is Status.COMPLETED


def test_an_event_for_a_saga_that_needs_attention_is_early_for_what_comes_then() -> None:
    @awaits(TripWanted, by="trip")
    def wanted_again(self: Any, event: TripWanted) -> None:
        assert self.trip == event.trip

    trip = run(sequence(pivot(), booking("a"), wanted_again)).succeeds().declines("no")
    assert trip.status is Status.NEEDS_ATTENTION
    assert decide(trip.definition, trip.instance, Happened("wanted_again", TripWanted(trip="1"), "m", trip.now)) is None
    assert trip.acts(Verb.SKIP, "a").receives(TripWanted(trip="1")).status is Status.COMPLETED


@pytest.mark.parametrize("ended", [True, False])
def test_a_pivot_that_succeeds_although_it_was_called_declined_calls_a_person(*, ended: bool) -> None:
    """There is no way to undo it: the money is taken, and the goods go back."""
    trip = run(sequence(booking("a"), parallel(booking("b"), booking("c"), needed="any"), pivot())).succeeds()
    trip.succeeds(step="b").declines("no", step="c").acts(Verb.RESOLVE, "pivot", resolution=Resolution.DECLINED)
    if ended:
        trip.succeeds(step="b").succeeds(step="a")
    trip.replies("pivot", DO, SUCCEEDED)
    because = "pivot declined: ada: a test; compensated, but pivot has succeeded, and nothing undoes it"
    assert (trip.status, trip.reason) == (Status.NEEDS_ATTENTION, because)
    if not ended:
        trip.succeeds(step="b")
    assert names(trip.acts(Verb.RETRY, "c").sent) == ([] if ended else ["cancel a"])
    if not ended:
        trip.succeeds(step="a")
    assert (trip.status, trip.reason) == (Status.COMPENSATED, "pivot declined: ada: a test")


def test_what_a_handler_says_of_a_step_that_an_operator_has_given_up_on_is_news() -> None:
    trip = run(sequence(booking("a"), booking("b"))).acts(Verb.RESOLVE, "a", resolution=Resolution.FAILED).succeeds()
    assert trip.status is Status.COMPENSATED
    assert names(trip.replies("a", DO, FAILED).sent) == ["cancel a"], "it may have been done after that"


def test_only_what_goes_back_can_be_called_undone() -> None:
    trip = run(sequence(parallel(booking("a"), booking("b"), needed="any"), booking("c"))).succeeds(step="a")
    trip.fails(step="b").fails(step="b").succeeds(step="c")
    assert trip.status is Status.NEEDS_ATTENTION
    with pytest.raises(NotPossibleError, match="only what is being undone can be resolved as undone"):
        trip.acts(Verb.RESOLVE, "c", resolution=Resolution.UNDONE)
    assert trip.acts(Verb.SKIP, "b").status is Status.COMPLETED


def test_a_child_that_needs_attention_turns_back_with_its_parent() -> None:
    trip = run(sequence(parallel(booking("a"), booking("b"), needed="any"))).succeeds(step="a")
    trip.fails(step="b").fails(step="b")
    parent = Origin(PARENT_ID, "child", 1, "tests")
    child = replace(trip.instance, origin=parent)
    assert child.status is Status.NEEDS_ATTENTION
    decision = decide(trip.definition, child, Recalled(1, "recall", trip.now))
    assert decision is not None
    assert [(each.step, each.direction) for each in decision.requests] == [("a", UNDO)]
