"""Instances that are taken over into another version of their saga, and those that must stay."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest

from coordinator import Saga, Status, migrates, parallel, sequence, starts_on, step, when
from coordinator.decision import Decision, Replied, Verb
from coordinator.flow import Node, each, nodes
from coordinator.instance import StepStatus
from coordinator.steps import Step
from coordinator.testing import SagaRun
from coordinator.transfer import NotTransferableError, transfer
from coordinator.waits import awaits
from events import Command, Event
from events.envelope import Direction, Result
from events.errors import DefinitionError
from tests.support.trips import Book, Cancel, TripWanted, booking, is_far, names, wanted
from tests.unit.test_fan_out import Delivery, Labelled
from tests.unit.test_fan_out import Ordered as Parcels
from tests.unit.test_waits import Bounced, Ordered, Paid, Prepaid, Ship


def as_it_was(cls: Any, old: Any) -> Any:
    return cls(trip=old.trip, far=old.far)


def version(
    number: int,
    flow: Node,
    migration: Callable[..., Any] = as_it_was,
    *,
    renamed: Mapping[str, str] | None = None,
    passed: tuple[str, ...] = (),
) -> type[Saga]:
    """A version of a trip with this flow, that takes over version 1."""
    steps = {node.name: node for node in nodes(flow) if isinstance(node, Step)}
    namespace: dict[str, Any] = {"__module__": __name__, "__annotations__": {"trip": str, "far": bool}, "far": False}
    namespace |= {"wanted": starts_on(TripWanted)(wanted), **steps, "flow": flow}
    if number > 1:
        namespace["taken_over"] = migrates(1, renamed=renamed, passed=passed)(migration)
    made: Any = type(Saga)
    return cast("type[Saga]", made("Trip", (Saga,), namespace, version=number))


def first(flow: Node, *, far: bool = False) -> SagaRun:
    return SagaRun(version(1, flow), TripWanted(trip="1", far=far))


def moved(run: SagaRun, to: type[Saga]) -> Decision:
    return run.migrates(to).last


def refused(run: SagaRun, to: type[Saga]) -> str:
    with pytest.raises(NotTransferableError) as found:
        moved(run, to)
    return str(found.value)


def abc(**more: Any) -> Node:
    return sequence(booking("a"), booking("b"), booking("c", **more))


def test_an_instance_goes_on_in_the_new_version_where_it_stood_in_the_old_one() -> None:
    run = first(abc()).succeeds()
    revision = run.instance.revision
    decision = moved(run, version(2, sequence(booking("a"), booking("b"), booking("new"), booking("c"))))
    assert (run.instance.version, run.instance.revision) == (2, revision + 1)
    assert run.sent == [], "b is under way"
    entry = decision.entry
    assert (entry.kind, entry.actor, entry.why) == ("migrated", "ada", "a test")
    assert entry.change["version"] == [1, 2]
    assert entry.change["state"] == run.instance.state
    assert set(entry.change["steps"]) == {"a", "b"}
    assert names(run.succeeds().sent) == ["book new"]
    assert names(run.declines("no").sent) == ["cancel b"]


def test_what_begins_at_once_is_sent_with_the_migration() -> None:
    run = first(sequence(booking("a"), booking("b")))
    decision = moved(run, version(2, parallel(booking("a"), booking("new"))))
    assert [request.step for request in decision.requests] == ["new"]


def test_one_that_needs_attention_gets_it_with_the_new_version() -> None:
    run = first(sequence(parallel(booking("a"), booking("b", undone=False)), booking("c"))).succeeds(step="a")
    run.declines("no", step="b").fails()  # a cannot be undone
    moved(run, version(2, sequence(booking("a"), booking("b", undone=False))))
    assert run.status is Status.NEEDS_ATTENTION
    assert run.acts(Verb.RETRY, "a").succeeds().status == "compensated"


def test_one_that_goes_back_goes_on_going_back() -> None:
    run = first(abc()).succeeds().succeeds().declines("no")
    assert names(run.sent) == ["cancel b"]
    moved(run, version(2, sequence(booking("new"), booking("a"), booking("b"), booking("c"))))
    assert names(run.succeeds().sent) == ["cancel a"]
    assert run.succeeds().status is Status.COMPENSATED


def test_the_migration_makes_the_new_state() -> None:
    def far_away(cls: Any, old: Any) -> Any:
        return cls(trip=old.trip, far=True)

    run = first(sequence(booking("a"), when(is_far, booking("b"))))
    moved(run, version(2, sequence(booking("a"), when(is_far, booking("b"))), far_away))
    assert names(run.succeeds().sent) == ["book b"]


def bad(_: Any, old: Any) -> Any:
    raise ValueError(f"not {old.trip}")


def wrong(_: Any, old: Any) -> Any:
    return old


def spoils(cls: Any, old: Any) -> Any:
    made = as_it_was(cls, old)
    made.trip = None
    return made


@pytest.mark.parametrize(
    ("migration", "why"),
    [(bad, "bad raised ValueError('not 1')"), (wrong, "wrong must return a Trip"), (spoils, "spoils raised")],
)
def test_what_a_migration_raises_is_why_an_instance_stays(migration: Callable[..., Any], why: str) -> None:
    assert why in refused(first(abc()), version(2, abc(), migration))


def test_without_a_migration_an_instance_stays() -> None:
    run = first(abc())
    with pytest.raises(NotTransferableError, match=r"version 1 has no method with @migrates\(from_=2\)"):
        transfer(version(2, abc()).definition, run.definition, run.instance, by="", why="", now=run.now)


@pytest.mark.parametrize("answers", [0, 1])
def test_what_has_begun_must_have_a_place(answers: int) -> None:
    run = first(sequence(booking("a"), booking("b")))
    for _ in range(answers):
        run.succeeds()
    status = "succeeded" if answers else "running"
    assert refused(run, version(2, sequence(booking("b")))) == f"a is {status}, and has no place in version 2"


def test_what_has_not_begun_or_had_no_effect_needs_none() -> None:
    run = first(abc()).succeeds().succeeds().declines("no").succeeds()
    assert run.instance.steps["c"].status is StepStatus.DECLINED
    assert run.instance.steps["b"].status is StepStatus.UNDONE
    moved(run, version(2, sequence(booking("a"))))
    assert run.succeeds().status is Status.COMPENSATED


def test_what_is_done_must_stay_undoable() -> None:
    run = first(abc()).succeeds()
    without = sequence(booking("a", undone=False), booking("b"), booking("c"))
    assert refused(run, version(2, without)) == "a is succeeded, and has no compensation any more"
    moved(run, version(2, sequence(booking("a", undone=False, pivot=True), booking("b"), booking("c"))))
    assert names(run.declines("no").sent) == [], "there is no way back now"
    assert run.status is Status.NEEDS_ATTENTION


def test_one_that_goes_back_gets_no_pivot() -> None:
    run = first(abc()).succeeds().declines("no")
    late = version(2, sequence(booking("a", undone=False, pivot=True), booking("b"), booking("c")))
    assert refused(run, late) == "a has become a pivot, and the saga is compensating"


def test_a_pivot_that_has_begun_stays_one() -> None:
    run = first(sequence(booking("a", undone=False, pivot=True), booking("b")))
    assert "must stay a pivot" in refused(run, version(2, sequence(booking("a"), booking("b"))))


def test_a_command_that_is_under_way_says_the_same_when_it_is_sent_again() -> None:
    """It has the same id: another content would be refused by its handler as a conflict."""

    def renamed_trip(cls: Any, old: Any) -> Any:
        return cls(trip=f"{old.trip}-bis", far=old.far)

    class BookTrip(Command):
        trip: str

    def a(self: Any) -> BookTrip:
        return BookTrip(trip=self.trip)

    run = first(sequence(step(timeout=10, resends=2)(a), booking("b")))
    later = version(2, sequence(step(timeout=10, resends=2)(a), booking("b")), renamed_trip)
    assert "would say something else when it sends it again" in refused(run, later)
    run.succeeds()
    moved(run, later)
    run = first(sequence(step(timeout=10, resends=2)(a), booking("b")))
    sent = run.last.requests
    moved(run, version(2, sequence(step(timeout=10, resends=2)(a), booking("new"))))
    run.passes(10)
    assert run.last.requests == sent


def test_a_compensation_that_is_under_way_says_the_same_too() -> None:
    def cancel(self: Any) -> Cancel:
        assert self.trip
        return Cancel(what="something else")

    other = booking("a", undone=False)
    other.compensation(cancel)
    run = first(abc()).succeeds().declines("no")
    assert "a is undoing, and version 2 would say something else" in refused(run, version(2, sequence(other)))


def test_a_step_keeps_its_name_while_it_may_have_to_be_undone() -> None:
    """Its compensation names the command by an id that is derived of it: another one would find nothing to undo."""
    run = first(abc()).succeeds()
    later = version(2, sequence(booking("x"), booking("b"), booking("c")), renamed={"a": "x"})
    assert refused(run, later) == "a is succeeded and may have to be undone: it must keep its name"


def test_a_step_without_a_compensation_is_renamed_once_it_is_over() -> None:
    later = version(2, sequence(booking("x", undone=False), booking("b")), renamed={"a": "x"})
    run = first(sequence(booking("a", undone=False), booking("b")))
    assert "it must keep its name" in refused(run, later)
    moved(run.succeeds(), later)
    assert run.succeeds().status is Status.COMPLETED
    assert set(run.instance.steps) == {"x", "b"}


def test_two_steps_do_not_become_one() -> None:
    run = first(sequence(booking("a", undone=False), booking("b", undone=False), booking("c"))).succeeds().succeeds()
    later = version(2, sequence(booking("b", undone=False), booking("c")), renamed={"a": "b"})
    assert refused(run, later) == "b and another part are both b in version 2"


def test_a_new_step_before_what_has_begun_is_passed_only_if_the_migration_says_so() -> None:
    flow = sequence(booking("new", undone=False), booking("a"), booking("b"), booking("c"))
    run = first(abc())
    assert refused(run, version(2, flow)).startswith("new stands before what has begun already")
    moved(run, version(2, flow, passed=("new",)))
    assert run.sent == []
    assert run.succeeds().succeeds().succeeds().status is Status.COMPLETED


def test_a_step_that_may_be_passed_is_taken_where_it_is_still_to_come() -> None:
    run = first(abc())
    later = version(2, sequence(booking("a"), booking("new", undone=False), booking("b")), passed=("new",))
    moved(run, later)
    assert names(run.succeeds().sent) == ["book new"]


def test_a_step_that_would_be_undone_is_not_passed() -> None:
    later = version(2, sequence(booking("new"), booking("a")), passed=("new",))
    assert "new cannot be passed" in refused(first(sequence(booking("a"))), later)


def test_a_condition_around_what_has_begun_counts_as_answered() -> None:
    run = first(abc()).succeeds()
    moved(run, version(2, sequence(booking("a"), when(is_far, booking("b")), booking("c"))))
    assert run.instance.steps["is_far"].status is StepStatus.TAKEN
    assert names(run.succeeds().sent) == ["book c"]


def test_a_condition_that_was_to_be_asked_before_is_passed_only_if_the_migration_says_so() -> None:
    flow = sequence(when(is_far, booking("new")), booking("a"))
    run = first(sequence(booking("a")))
    assert refused(run, version(2, flow)).startswith("is_far stands before what has begun already")
    moved(run, version(2, flow, passed=("is_far",)))
    assert run.succeeds().status is Status.COMPLETED
    assert run.instance.steps["is_far"].status is StepStatus.NOT_TAKEN


@pytest.mark.parametrize("far", [True, False])
def test_what_has_begun_must_be_what_the_answer_to_a_condition_leads_to(*, far: bool) -> None:
    run = first(when(is_far, booking("a"), otherwise=booking("b")), far=far)
    later = version(2, when(is_far, booking("b"), otherwise=booking("a")))
    assert refused(run, later) == "what has begun is not what the answer to is_far leads to"


def test_one_that_would_turn_back_at_once_stays() -> None:
    def broken(self: Any) -> Command:
        raise RuntimeError(f"{self.trip} is broken")

    later = version(2, parallel(booking("a"), step(broken)))
    assert "version 2 could not go on with it: broken could not be asked for" in refused(first(abc()), later)


def test_one_that_has_ended_stays() -> None:
    assert refused(first(sequence(booking("a"))).succeeds(), version(2, abc())) == "it has ended"


def test_an_answer_to_the_old_version_is_taken_by_the_new_one_once() -> None:
    run = first(abc())
    moved(run, version(2, abc()))
    answer = Replied("a", Direction.DO, 1, Result.SUCCEEDED, None, "", "m-9", run.now)
    assert [request.step for request in (run.take(answer) or run.last).requests] == ["b"]
    run.take(answer)
    assert run.last.entry.kind == "late_reply"


def later(saga: type[Saga], flow: Node, lock: str | None = None, **more: Any) -> type[Saga]:
    """The next version of a saga, with the same state and another flow."""

    def taken_over(cls: Any, old: Any) -> Any:
        return cls.from_state(old.to_state())

    namespace = {"__module__": __name__, **more, "flow": flow, "taken_over": migrates(1)(taken_over)}
    made: Any = type(Saga)
    about = {"name": saga.definition.name, "version": 2, "lock": lock}
    return cast("type[Saga]", made(saga.__name__, (saga,), namespace, **about))


def test_one_that_waits_for_an_event_goes_on_waiting_for_it() -> None:
    run = SagaRun(Prepaid, Ordered(order="o")).succeeds()
    moved(run, later(Prepaid, sequence(Prepaid.reserve, Prepaid.paid, Prepaid.ship, Prepaid.objection_period)))
    assert run.last.over == ()
    assert run.receives(Paid(order="o", payment="p")).sent == [Ship(order="o", payment="p")]


def test_one_does_not_get_a_version_with_a_lock_that_it_does_not_hold() -> None:
    run = SagaRun(Prepaid, Ordered(order="o"))
    assert "it does not hold order" in refused(run, later(Prepaid, Prepaid.flow, lock="order"))


def test_one_that_waits_for_an_event_stays_where_nobody_would_take_it() -> None:
    @awaits(Bounced, by="order")
    def paid(self: Any, event: Bounced) -> None:
        self.payment = event.reason

    run = SagaRun(Prepaid, Ordered(order="o")).succeeds()
    other = later(Prepaid, sequence(Prepaid.reserve, paid, Prepaid.objection_period, Prepaid.ship), paid=paid)
    assert refused(run, other) == "paid waits for something else in version 2"
    moved(run.receives(Paid(order="o", payment="p")), other)
    assert run.passes(86_400).sent == [Ship(order="o", payment="p")]


def test_a_part_that_has_begun_does_not_become_another_kind_of_part() -> None:
    run = SagaRun(Delivery, Parcels(order="o")).succeeds()
    ship = booking("ship")
    other = later(Delivery, sequence(Delivery.pick, ship), ship=ship)
    with pytest.raises(NotTransferableError, match="ship has begun, and is another kind of part in version 2"):
        run.migrates(other)


def test_one_with_items_under_way_stays_until_all_of_them_are_over() -> None:
    def more(self: Any) -> Book:
        return Book(what=self.order)

    run = SagaRun(Delivery, Parcels(order="o", parcels=1)).succeeds()
    ship = each(Delivery.all_parcels, Delivery.ship, limit=2)
    other = later(Delivery, sequence(Delivery.pick, ship, step(more)))
    assert refused(run, other) == "items of ship are under way: wait until all of them are over"
    run = SagaRun(Delivery, Parcels(order="o", parcels=1))
    moved(run, other)
    assert names(run.succeeds().succeeds(Labelled(label="1")).sent) == ["book o"]


def test_what_has_begun_stays_in_the_same_branches() -> None:
    run = first(parallel(booking("a"), booking("b")))
    other = parallel(booking("a"), booking("b"), needed=1)
    assert refused(run, version(2, other)) == "a has begun, and stands in another branch in version 2"
    run = first(sequence(other, booking("c")))
    moved(run, version(2, sequence(other, booking("d"))))
    assert "book d" in names(run.succeeds(step="a").sent)


def test_what_has_not_begun_in_a_branch_that_was_not_needed_is_not_missed() -> None:
    flow = parallel(booking("a"), sequence(booking("b"), booking("never")), needed=1)
    run = first(sequence(flow, booking("c"))).declines("no", step="b").succeeds(step="a")
    assert names(run.sent) == ["book c"]
    moved(run, version(2, sequence(flow, booking("c"), booking("d"))))
    assert names(run.succeeds().sent) == ["book d"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"from_": 2}, "migrates from another version, not its own"),
        ({"from_": 0}, "migrates from another version, not its own"),
        ({"from_": 1, "renamed": {"a": "x"}}, "names x, which is not in its flow"),
        ({"from_": 1, "passed": ["x"]}, "names x, which is not in its flow"),
    ],
)
def test_a_migration_that_cannot_work_is_refused_with_its_class(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(DefinitionError, match=why):

        class Later(Saga, version=2):
            trip: str

            @starts_on(TripWanted)
            @classmethod
            def wanted(cls, event: Event) -> Any:
                return event

            @step
            def a(self) -> Book:
                return Book(what=self.trip)

            flow = sequence(a)

            @migrates(**arguments)
            @classmethod
            def taken_over(cls, old: Any) -> Any:
                return old
