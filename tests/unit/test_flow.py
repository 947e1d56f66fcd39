"""Flows: what runs side by side, what is chosen, and how all of it is undone."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import Backoff, Status, parallel, sequence, when
from coordinator.flow import Leaf, Node, Parallel, Sequence, When, nodes
from coordinator.instance import StepStatus
from coordinator.steps import Hook, Step
from coordinator.testing import BEGIN, SagaRun
from events.envelope import Direction, Result
from events.errors import DefinitionError
from tests.support.histories import findings
from tests.support.trips import booking, is_far, names, run, saga


def test_parts_of_a_parallel_begin_together_and_what_follows_waits_for_all_of_them() -> None:
    trip = run(sequence(booking("a"), parallel(booking("b"), sequence(booking("c"), booking("d"))), booking("e")))
    assert names(trip.succeeds().sent) == ["book b", "book c"]
    assert names(trip.succeeds(step="c").sent) == ["book d"]
    assert names(trip.succeeds(step="b").sent) == []
    assert names(trip.succeeds(step="d").sent) == ["book e"]
    assert trip.succeeds().status is Status.COMPLETED


def test_when_a_branch_fails_the_others_are_undone_as_soon_as_they_have_answered() -> None:
    trip = run(sequence(booking("a"), parallel(booking("b"), booking("c"), booking("d"))))
    trip.succeeds()
    trip.succeeds(step="b")
    assert names(trip.declines("no room", step="c").sent) == ["cancel b"], "d may still be under way"
    assert names(trip.succeeds(step="d").sent) == ["cancel d"]
    assert names(trip.succeeds(step="d").sent) == [], "b is not undone yet"
    assert names(trip.succeeds(step="b").sent) == ["cancel a"]
    assert trip.succeeds().status is Status.COMPENSATED
    assert trip.reason == "c declined: no room"


def test_nothing_new_begins_in_a_branch_beside_one_that_failed() -> None:
    trip = run(parallel(sequence(booking("a"), booking("b")), booking("c")))
    trip.fails(step="c")
    assert names(trip.succeeds(step="a").sent) == ["cancel a"]


def test_a_branch_that_gives_no_answer_beside_one_that_failed_is_not_asked_again_but_undone() -> None:
    trip = run(parallel(booking("a"), booking("b")))
    trip.declines("no room", step="a")
    trip.gives_no_answer()
    assert names(trip.sent) == ["cancel b"]
    assert trip.succeeds().status is Status.COMPENSATED


def test_branches_are_undone_side_by_side_and_each_in_reverse() -> None:
    trip = run(
        sequence(parallel(sequence(booking("a"), booking("b")), sequence(booking("c"), booking("d"))), booking("e"))
    )
    for each in ("a", "b", "c", "d"):
        trip.succeeds(step=each)
    assert names(trip.declines("no").sent) == ["cancel d", "cancel b"]
    assert names(trip.succeeds(step="b").sent) == ["cancel a"]
    assert names(trip.succeeds(step="d").sent) == ["cancel c"]
    trip.succeeds(step="a")
    assert trip.succeeds().status is Status.COMPENSATED


@pytest.mark.parametrize(("far", "expected"), [(True, ["book flight"]), (False, ["book train"])])
def test_a_condition_chooses_the_way_once(far: bool, expected: list[str]) -> None:
    trip = run(sequence(when(is_far, booking("flight"), otherwise=booking("train")), booking("hotel")), far=far)
    assert names(trip.sent) == expected
    assert trip.instance.steps["is_far"].status is (StepStatus.TAKEN if far else StepStatus.NOT_TAKEN)
    assert names(trip.succeeds().sent) == ["book hotel"]
    undone = trip.declines("no").sent
    assert names(undone) == [expected[0].replace("book", "cancel")]
    assert trip.succeeds().status is Status.COMPENSATED


def test_without_another_way_nothing_is_done_where_a_condition_does_not_hold() -> None:
    assert names(run(sequence(when(is_far, booking("visa")), booking("hotel"))).sent) == ["book hotel"]
    assert run(when(is_far, booking("visa"))).status is Status.COMPLETED


@pytest.mark.parametrize("answer", ["yes", None, 1, ValueError("broken")])
def test_a_condition_that_cannot_be_told_turns_the_saga_back(answer: object) -> None:
    def is_odd(self: Any) -> Any:
        assert self.trip
        if isinstance(answer, Exception):
            raise answer
        return answer

    trip = run(sequence(booking("a"), when(is_odd, booking("b"))))
    assert names(trip.succeeds().sent) == ["cancel a"]
    assert trip.reason is not None
    assert trip.reason.startswith("is_odd could not be told: ")


def test_what_is_no_part_of_a_flow_is_refused() -> None:
    with pytest.raises(DefinitionError, match="parallel takes steps and parts of a flow"):
        parallel(booking("a"), "b")  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="sequence needs at least one part"):
        sequence()
    with pytest.raises(DefinitionError, match=r"its condition; .* has no name"):
        when(lambda saga: saga.far, booking("a"))
    with pytest.raises(DefinitionError, match=r"two steps or conditions .* have the same name"):
        saga(sequence(when(is_far, booking("a")), when(is_far, booking("b"))))


# Forward recovery


def pivoted() -> SagaRun:
    recovery = Backoff(3, first=10)
    return run(
        sequence(
            booking("a"),
            booking("pivot", undone=False, pivot=True, recovery=recovery),
            booking("after", undone=False, recovery=recovery),
        )
    )


def test_a_pivot_that_declines_is_the_last_moment_to_turn_back() -> None:
    trip = pivoted().succeeds()
    assert names(trip.declines("no").sent) == ["cancel a"]


def test_a_pivot_whose_outcome_is_not_known_is_tried_anew_and_not_undone() -> None:
    trip = pivoted().succeeds().fails()
    assert (trip.status, names(trip.sent)) == (Status.RUNNING, [])
    assert trip.instance.steps["pivot"].status is StepStatus.RETRYING
    assert names(trip.passes(10).sent) == ["book pivot"]
    assert trip.last.requests[0].attempt == 2
    assert names(trip.gives_no_answer().sent) == []
    assert names(trip.passes(20).sent) == ["book pivot"]
    assert names(trip.declines("no").sent) == ["cancel a"], "it has not happened, and now that is known"


def test_after_a_pivot_what_fails_is_tried_anew_until_a_person_must_look() -> None:
    trip = pivoted().succeeds().succeeds().fails("no answer").passes(10).fails().passes(20)
    assert names(trip.sent) == ["book after"]
    trip.fails()
    assert (trip.status, trip.reason) == (Status.NEEDS_ATTENTION, "after failed: failed: out of order")
    assert trip.instance.due_at is None
    assert all(request.direction is Direction.DO for decision in trip.decisions for request in decision.requests)
    trip.replies("after", Direction.DO, Result.SUCCEEDED, attempt=3)
    assert (trip.status, trip.reason) == (Status.COMPLETED, None), "heard of late, and there is only the way on"


def test_after_a_pivot_a_no_calls_a_person() -> None:
    trip = pivoted().succeeds().succeeds().declines("sold out")
    assert (trip.status, trip.reason, names(trip.sent)) == (Status.NEEDS_ATTENTION, "after declined: sold out", [])


@pytest.mark.parametrize("waits", [True, False])
def test_a_success_of_the_attempt_before_ends_the_recovery(waits: bool) -> None:
    trip = pivoted().succeeds().succeeds().gives_no_answer()
    if not waits:
        trip.passes(10)
    assert trip.replies("after", Direction.DO, Result.SUCCEEDED, attempt=1).status is Status.COMPLETED
    assert trip.replies("after", Direction.DO, Result.SUCCEEDED, attempt=2).status is Status.COMPLETED


def test_a_compensation_that_fails_is_asked_for_anew_and_the_one_before_waits_for_it() -> None:
    trip = run(sequence(booking("a"), booking("b", retry=Backoff(2, first=5)), booking("c")))
    trip.succeeds().succeeds().declines("no").fails()
    assert (trip.status, names(trip.sent)) == (Status.COMPENSATING, [])
    assert names(trip.passes(5).sent) == ["cancel b"]
    assert names(trip.fails().sent) == ["cancel a"], "others are undone all the same"
    assert trip.succeeds().status is Status.NEEDS_ATTENTION
    trip = (
        run(sequence(booking("b", retry=Backoff(2, first=5)), booking("c"))).succeeds().declines("no").gives_no_answer()
    )
    for _ in range(5):
        trip.gives_no_answer()
    assert trip.instance.steps["b"].status is StepStatus.UNDO_RETRYING
    assert trip.replies("b", Direction.UNDO, Result.SUCCEEDED).status is Status.COMPENSATED, "the first one, late"


def test_a_pivot_that_cannot_work_is_refused() -> None:
    with pytest.raises(DefinitionError, match="x is a pivot: there is no way back to undo it"):
        saga(sequence(booking("x", pivot=True)))
    with pytest.raises(DefinitionError, match="x is a pivot and cannot stand in a parallel part"):
        saga(parallel(booking("a"), sequence(booking("x", undone=False, pivot=True))))
    bad: list[dict[str, Any]] = [
        {"attempts": 0},
        {"attempts": 1, "first": 0},
        {"attempts": 1, "factor": 0.5},
        {"attempts": 1, "most": 1},
    ]
    for wrong in bad:
        with pytest.raises(DefinitionError, match="attempts count from 1"):
            Backoff(**wrong)
    assert Backoff(9, first=1, most=1e6).wait(5000) == 1e6


# The saga's own deadline


def test_a_saga_that_is_not_done_in_time_turns_back_and_waits_for_what_is_under_way() -> None:
    trip = run(sequence(booking("a"), booking("b"), booking("c")), deadline=100)
    trip.succeeds().passes(60).succeeds()
    assert trip.instance.due_at is not None
    assert (trip.instance.due_at - BEGIN).total_seconds() == 100
    trip.gives_no_answer()
    assert (trip.status, trip.reason) == (Status.COMPENSATING, "it was not done by 2026-01-01 00:01:40 UTC")
    assert names(trip.sent) == [], "c is under way"
    assert names(trip.succeeds(step="c").sent) == ["cancel c"]
    assert trip.succeeds().succeeds().succeeds().status is Status.COMPENSATED


def test_past_a_pivot_the_deadline_of_a_saga_is_over() -> None:
    flow = sequence(booking("a"), booking("pivot", undone=False, pivot=True), booking("c", undone=False))
    waiting = run(flow, deadline=100).succeeds().passes(200)
    assert waiting.status is Status.RUNNING, "the pivot may have happened"
    trip = run(flow, deadline=100).succeeds().succeeds().passes(200)
    assert trip.status is Status.RUNNING
    assert trip.succeeds().status is Status.COMPLETED


def test_a_saga_that_is_done_in_time_has_no_deadline_any_more() -> None:
    trip = run(sequence(booking("a")), deadline=100).succeeds()
    assert (trip.status, trip.instance.due_at) == (Status.COMPLETED, None)


@pytest.mark.parametrize("deadline", [0, -1, 1e10, float("nan")])
def test_a_deadline_that_makes_no_sense_is_refused(deadline: float) -> None:
    with pytest.raises(DefinitionError, match="a deadline is positive"):
        saga(sequence(booking("a")), deadline=deadline)


@given(st.lists(st.sampled_from([Result.SUCCEEDED, Result.DECLINED, Result.FAILED, None]), min_size=1, max_size=40))
def test_whatever_happens_nothing_is_undone_after_a_pivot(results: list[Result | None]) -> None:
    trip = pivoted()
    for result in results:
        if not trip.status.in_flight:
            break
        waiting = [name for name, at in trip.instance.steps.items() if at.status.outstanding]
        if result is None or not waiting:
            trip.gives_no_answer()
            continue
        at = trip.instance.steps[waiting[0]]
        direction = Direction.DO if at.status is StepStatus.RUNNING else Direction.UNDO
        trip.replies(
            waiting[0], direction, result, attempt=at.attempt if direction is Direction.DO else at.undo_attempt
        )
    undone = any(request.direction is Direction.UNDO for decision in trip.decisions for request in decision.requests)
    assert findings(trip.decisions, trip.now) == []
    pivot = trip.instance.steps.get("pivot")
    if pivot is not None and pivot.status is StepStatus.SUCCEEDED:
        assert not undone
        assert trip.status in (Status.RUNNING, Status.COMPLETED, Status.NEEDS_ATTENTION)
    if undone:
        assert pivot is None or pivot.status is StepStatus.DECLINED


@st.composite
def flows(draw: st.DrawFn) -> Node:
    """Any nesting of sequence, parallel and when, of up to 8 steps."""
    steps = iter("abcdefgh")
    conditions = iter(range(8))

    def one(depth: int) -> Node | None:
        kind = draw(st.sampled_from(["step", "sequence", "parallel", "when"] if depth else ["step"]))
        if kind == "step":
            name = next(steps, None)
            return booking(name, undone=draw(st.booleans())) if name else None
        parts = [part for _ in range(draw(st.integers(1, 3))) if (part := one(depth - 1)) is not None]
        if not parts:
            return None
        if kind == "when":
            holds = draw(st.booleans())

            def condition(self: Any) -> bool:
                assert self.trip
                return holds

            condition.__name__ = f"condition_{next(conditions)}"
            return when(condition, parts[0], otherwise=parts[1] if len(parts) > 1 else None)
        return sequence(*parts) if kind == "sequence" else parallel(*parts)

    return one(3) or booking("a")


def precedes(node: Node) -> set[tuple[str, str]]:
    """Pairs of steps of which the first must be done before the second begins."""
    if isinstance(node, Leaf):
        return set()
    found = {pair for part in node.parts for pair in precedes(part)}
    if isinstance(node, Sequence):
        leaves = [[each.name for each in nodes(part) if isinstance(each, Step)] for part in node.parts]
        for number, earlier in enumerate(leaves):
            found |= {(a, b) for later in leaves[number + 1 :] for a in earlier for b in later}
    return found


class World:
    """Answers what a saga sends, in any order, once, twice or not at all, and keeps what was done."""

    def __init__(self, flow: Node, data: st.DataObject) -> None:
        self.trip = run(flow)
        self.data = data
        self.log: list[str] = []  # what took effect: `book a`, `cancel a`

    def play(self) -> None:
        for _ in range(200):
            if not self.trip.status.in_flight:
                return
            waiting = self.outstanding()
            if self.data.draw(st.integers(0, 9)) == 0:
                self.trip.gives_no_answer()
                continue
            name, direction, attempt = self.data.draw(st.sampled_from(waiting))
            result = self.data.draw(st.sampled_from([Result.SUCCEEDED] * 5 + [Result.DECLINED, Result.FAILED]))
            if direction is Direction.UNDO:
                result = Result.SUCCEEDED
            if result is not Result.DECLINED:
                self.log.append(f"{'book' if direction is Direction.DO else 'cancel'} {name}")
            for _ in range(self.data.draw(st.integers(1, 2))):
                self.trip.replies(name, direction, result, attempt=attempt)
        raise AssertionError("it goes on for ever")

    def outstanding(self) -> list[tuple[str, Direction, int]]:
        return [
            (name, Direction.DO, at.attempt)
            if at.status is StepStatus.RUNNING
            else (name, Direction.UNDO, at.undo_attempt)
            for name, at in self.trip.instance.steps.items()
            if at.status.outstanding
        ]


@given(flows(), st.data())
def test_any_flow_ends_with_all_done_or_exactly_that_undone_in_reverse(flow: Node, data: st.DataObject) -> None:
    """I1 it ends; I3 what was done is undone, a later step before an earlier one."""
    world = World(flow, data)
    world.play()
    trip = world.trip
    assert findings(trip.decisions, trip.now) == []
    steps = {node.name: node for node in nodes(flow) if isinstance(node, Step)}
    states = trip.instance.steps
    taken = {name for name in states if name in steps}
    if trip.status is Status.COMPLETED:
        assert {states[name].status for name in taken} <= {StepStatus.SUCCEEDED}
        assert taken == expected(flow, states)
        return
    lost = {name for name in taken if states[name].status is StepStatus.UNDO_FAILED}
    assert trip.status is (Status.NEEDS_ATTENTION if lost else Status.COMPENSATED)
    for name in taken - lost:
        if steps[name].undo is not None:
            assert states[name].status in (StepStatus.UNDONE, StepStatus.DECLINED)
    sent = [(request.step, request.direction) for decision in trip.decisions for request in decision.requests]
    for first, second in precedes(flow):
        if {first, second} <= taken:
            assert sent.index((first, Direction.DO)) < sent.index((second, Direction.DO))
        if (first, Direction.UNDO) in sent and (second, Direction.UNDO) in sent:
            assert sent.index((second, Direction.UNDO)) < sent.index((first, Direction.UNDO))


def expected(node: Node, states: Any) -> set[str]:
    """The steps that must have been taken when all is done."""
    match node:
        case When(condition=Hook(name=name), then=then, otherwise=otherwise):
            chosen = then if states[name].status is StepStatus.TAKEN else otherwise
            return expected(chosen, states) if chosen is not None else set()
        case Sequence(parts) | Parallel(parts):
            return {name for part in parts for name in expected(part, states)}
    return {node.name}
