"""One step for each of several items, branches of which not all are needed, and children: decided on by hand."""

from dataclasses import replace
from typing import Any, Self

import pytest
from pydantic_core import to_json

from coordinator.decide import decide
from coordinator.decision import Acted, Verb
from coordinator.definition import Saga
from coordinator.flow import each, parallel, sequence
from coordinator.instance import Status, StepState, StepStatus
from coordinator.steps import Backoff, starts_on, step
from coordinator.testing import SagaRun
from events.envelope import Direction, Result
from events.errors import DefinitionError
from events.message import Command, Event, Reply
from tests.support.packing import Pack, Packed, Packing, Pick, PutBack

DO, UNDO = Direction.DO, Direction.UNDO
SUCCEEDED, DECLINED, FAILED = Result.SUCCEEDED, Result.DECLINED, Result.FAILED


class Ordered(Event):
    order: str
    parcels: int = 3


class ShipParcel(Command):
    order: str
    parcel: str
    label: str | None = None


class CallBack(Command):
    parcel: str
    label: str | None


class Labelled(Reply):
    label: str


class Delivery(Saga):
    """Many parcels, two at a time."""

    order: str
    parcels: int = 0
    shipped: int = 0

    @starts_on(Ordered)
    @classmethod
    def ordered(cls, event: Ordered) -> Self:
        return cls(order=event.order, parcels=event.parcels)

    @step
    def pick(self) -> Pick:
        return Pick(order=self.order)

    @pick.compensation
    def put_back(self) -> PutBack:
        return PutBack(order=self.order)

    def all_parcels(self) -> list[dict[str, str]]:
        return [{"parcel": f"p-{number}"} for number in range(self.parcels)]

    @step(timeout=60)
    def ship(self, item: dict[str, str]) -> ShipParcel:
        return ShipParcel(order=self.order, parcel=item["parcel"])

    @ship.succeeded
    def labelled(self, item: dict[str, str], outcome: Labelled) -> dict[str, str]:
        self.shipped += 1
        return {**item, "label": outcome.label}

    @ship.compensation(retry=Backoff(1))
    def call_back(self, item: dict[str, str]) -> CallBack:
        return CallBack(parcel=item["parcel"], label=item.get("label"))

    flow = sequence(pick, each(all_parcels, ship, limit=2))


class Tolerant(Delivery):
    """Goes on without the parcels that cannot be shipped."""

    flow = sequence(Delivery.pick, each(Delivery.all_parcels, Delivery.ship, limit=2, on_failure="collect"))


def delivery(parcels: int = 3, saga: type[Saga] = Delivery) -> SagaRun:
    return SagaRun(saga, Ordered(order="o", parcels=parcels)).succeeds()


def parcels(run: SagaRun) -> list[str]:
    return [command.parcel for command in run.sent if isinstance(command, ShipParcel | CallBack)]


def test_items_are_begun_in_order_and_no_more_than_the_limit_at_a_time() -> None:
    run = delivery(5)
    assert parcels(run) == ["p-0", "p-1"]
    assert parcels(run.succeeds(Labelled(label="b"), step="ship[1]")) == ["p-2"]
    assert parcels(run.succeeds(Labelled(label="a"), step="ship[0]")) == ["p-3"]
    assert parcels(run.succeeds(Labelled(label="c"), step="ship[2]")) == ["p-4"]
    assert run.succeeds(Labelled(label="d"), step="ship[3]").sent == []
    run.succeeds(Labelled(label="e"), step="ship[4]")
    assert run.status == "completed"
    assert run.saga.model_dump()["shipped"] == 5


def test_no_items_are_done_at_once() -> None:
    assert delivery(0).status == "completed"


def test_one_item_that_fails_undoes_all_others_from_the_last_one_back_with_what_is_known_of_them() -> None:
    run = delivery(4)
    run.succeeds(Labelled(label="a"), step="ship[0]").succeeds(Labelled(label="b"), step="ship[1]")
    run.declines("the address is wrong", step="ship[2]")
    assert run.sent == [CallBack(parcel="p-1", label="b")]  # ship[3] is under way: nobody knows yet
    assert run.reason == "ship[2] declined: the address is wrong"
    run.succeeds(Labelled(label="d"), step="ship[3]")
    assert run.sent == [CallBack(parcel="p-3", label="d")]
    run.succeeds(step="ship[3]")
    assert run.sent == [CallBack(parcel="p-0", label="a")]
    run.succeeds(step="ship[0]").succeeds(step="ship[1]")
    assert run.sent == [PutBack(order="o")]
    assert run.succeeds().status == "compensated"


def test_items_can_fail_alone_and_what_nobody_knows_of_is_undone() -> None:
    run = delivery(3, Tolerant)
    assert parcels(run.declines("no", step="ship[0]")) == ["p-2"]
    run.fails(step="ship[1]")
    assert run.sent == [CallBack(parcel="p-1", label=None)]
    run.succeeds(Labelled(label="c"), step="ship[2]")
    assert run.status == "running"
    run.succeeds(step="ship[1]")
    assert run.status == "completed"
    assert run.instance.steps["ship"].fan is not None
    assert run.instance.steps["ship"].fan.failed == 2


def test_an_item_that_cannot_be_undone_calls_a_person_who_sees_to_it() -> None:
    run = delivery(3, Tolerant)
    run.fails(step="ship[0]").fails(step="ship[0]")
    run.succeeds(Labelled(label="b"), step="ship[1]").succeeds(Labelled(label="c"), step="ship[2]")
    assert run.status == "needs_attention"
    assert run.reason is not None
    assert "ship[0] could not be undone" in run.reason
    run.acts(Verb.RETRY, "ship[0]")
    assert run.sent == [CallBack(parcel="p-0", label=None)]
    assert run.succeeds().status == "completed"


def test_an_item_of_a_saga_that_goes_back_can_be_skipped_when_it_cannot_be_undone() -> None:
    run = delivery(2)
    run.succeeds(Labelled(label="a"), step="ship[0]").declines("no", step="ship[1]")
    run.fails(step="ship[0]")
    assert (run.status, run.sent) == (Status.COMPENSATING, [PutBack(order="o")])
    run.succeeds()
    assert run.status == "needs_attention"
    assert run.acts(Verb.SKIP, "ship[0]").status == "compensated"


def test_the_answer_of_an_item_that_comes_too_late_is_undone_as_well() -> None:
    run = delivery(2).declines("no", step="ship[0]").gives_no_answer()
    assert run.sent == [CallBack(parcel="p-1", label=None)]
    run.replies("ship[1]", DO, SUCCEEDED, Labelled(label="late"))
    assert run.sent == [CallBack(parcel="p-1", label="late")]
    run.replies("ship[1]", UNDO, SUCCEEDED, attempt=2)
    assert run.succeeds(step="pick").status == "compensated"
    run.replies("ship[1]", DO, SUCCEEDED, Labelled(label="late"))
    assert run.last.entry.kind == "late_reply"


def test_all_items_see_the_state_as_it_was_when_the_first_began() -> None:
    run = delivery(3)
    run.succeeds(Labelled(label="a"), step="ship[0]")
    assert run.instance.steps["ship"].made_of == {"order": "o", "parcels": 3, "shipped": 0}


def test_the_history_does_not_repeat_the_state_with_each_item() -> None:
    """A list of many items in the state would be written once for each of them."""
    run = delivery(3)
    for number in range(3):
        run.succeeds(Labelled(label="a"), step=f"ship[{number}]")
    assert all(b"parcels" not in to_json(decision.entry.change) for decision in run.decisions[1:])


class Counted(Delivery):
    """Every command says how many parcels were shipped by then."""

    @step
    def ship(self, item: dict[str, str]) -> ShipParcel:
        return ShipParcel(order=f"{self.shipped} shipped", **item)

    @ship.succeeded
    def labelled(self, item: dict[str, str], _: Labelled) -> dict[str, str]:
        self.shipped += 1
        return item

    @ship.compensation
    def call_back(self, item: dict[str, str]) -> CallBack:
        return CallBack(**item, label=f"{self.shipped} shipped")

    flow = sequence(Delivery.pick, each(Delivery.all_parcels, ship, limit=2))


class CountedTolerant(Counted):
    """Goes on without those that cannot be shipped."""

    flow = sequence(Delivery.pick, each(Delivery.all_parcels, Counted.ship, limit=2, on_failure="collect"))


def test_an_item_that_is_sent_again_when_others_are_undone_says_what_it_said() -> None:
    run = delivery(3, Counted).succeeds(Labelled(label="a"), step="ship[0]")
    assert run.sent == [ship_last := ShipParcel(order="0 shipped", parcel="p-2")]
    run.declines("no", step="ship[1]")
    assert run.sent == [call_back := CallBack(parcel="p-0", label="1 shipped")]
    assert run.acts(Verb.RETRY, "ship[2]").sent == [ship_last]
    assert run.acts(Verb.RETRY, "ship[0]").sent == [call_back]
    run.succeeds(Labelled(label="c"), step="ship[2]")
    assert run.sent == [CallBack(parcel="p-2", label="1 shipped")], "as when the first was undone"
    assert run.acts(Verb.RETRY, "ship[0]").sent == [call_back]
    run.succeeds(step="ship[0]").succeeds(step="ship[2]")
    steps = run.instance.steps
    assert (steps["ship"].made_of, steps["ship"].before_turn) == (None, None), "kept no longer than it is needed"


def test_an_item_that_is_undone_alone_says_so_again_when_others_are_undone_too() -> None:
    run = delivery(2, CountedTolerant).fails(step="ship[0]")
    assert run.sent == [alone := CallBack(parcel="p-0", label="0 shipped")]
    run.succeeds(Labelled(label="b"), step="ship[1]").acts(Verb.CANCEL)
    assert run.sent == [with_all := CallBack(parcel="p-1", label="1 shipped")]
    assert run.acts(Verb.RETRY, "ship[0]").sent == [alone]
    assert run.passes(300).sent == [with_all]
    assert run.passes(300).sent == [alone]


def test_what_an_older_process_has_stored_is_sent_again_as_it_would_have_done() -> None:
    run = delivery(3, Counted).succeeds(Labelled(label="a"), step="ship[0]").declines("no", step="ship[1]")
    steps = dict(run.instance.steps)
    steps["ship"] = StepState.from_json(
        {name: value for name, value in steps["ship"].to_json().items() if name != "before_turn"}
    )
    stored = replace(run.instance, steps=steps)
    again = decide(run.definition, stored, Acted(Verb.RETRY, "ada", "a test", run.now, "ship[2]"))
    assert again is not None
    assert [each.command for each in again.requests] == [ShipParcel(order="1 shipped", parcel="p-2")]


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ("no list", "all_parcels must return a list, not str"),
        ([object()], "returned what is not JSON"),
        ([1] * 100_001, "100001 items; 100000 are the most"),
    ],
)
def test_items_that_are_none_turn_the_saga_back(items: Any, said: str) -> None:
    class Odd(Delivery):
        """Has no proper items."""

        def all_parcels(self) -> list[Any]:
            return items  # type: ignore[no-any-return]  # that is the point

        flow = sequence(Delivery.pick, each(all_parcels, Delivery.ship))

    run = delivery(3, Odd)
    assert run.reason is not None
    assert said in run.reason
    assert run.sent == [PutBack(order="o")]


def test_what_each_cannot_take_is_refused_where_it_is_written() -> None:
    @step(pivot=True)
    def point(_: Any, item: str) -> Pick:
        return Pick(order=item)

    for arguments, said in (
        ((Delivery.all_parcels, Delivery.all_parcels), "takes a step"),
        ((Delivery.all_parcels, point), "is a pivot"),
        ((3, Delivery.ship), "has no name"),
    ):
        with pytest.raises(DefinitionError, match=said):
            each(*arguments)
    with pytest.raises(DefinitionError, match="limit counts"):
        each(Delivery.all_parcels, Delivery.ship, limit=0)
    with pytest.raises(DefinitionError, match="undo or collect"):
        each(Delivery.all_parcels, Delivery.ship, on_failure="stop")


# Branches of which not all are needed


class Offers(Saga):
    """Asks three carriers."""

    order: str

    @starts_on(Ordered)
    @classmethod
    def ordered(cls, event: Ordered) -> Self:
        return cls(order=event.order)

    @step(timeout=60)
    def first(self) -> ShipParcel:
        return ShipParcel(order=self.order, parcel="1")

    @first.compensation
    def undo_first(self) -> CallBack:
        return CallBack(parcel="1", label=None)

    @step(timeout=60)
    def second(self) -> ShipParcel:
        return ShipParcel(order=self.order, parcel="2")

    @second.compensation
    def undo_second(self) -> CallBack:
        return CallBack(parcel="2", label=None)

    @step(timeout=60)
    def third(self) -> ShipParcel:
        return ShipParcel(order=self.order, parcel="3")

    @third.compensation
    def undo_third(self) -> CallBack:
        return CallBack(parcel="3", label=None)

    @step
    def pick(self) -> Pick:
        return Pick(order=self.order)

    flow = sequence(parallel(first, second, third, needed="any"), pick)


def offers(needed: int | str, stragglers: str = "undo") -> SagaRun:
    class Some(Offers):
        """With its own rule."""

        flow = sequence(
            parallel(Offers.first, Offers.second, Offers.third, needed=needed, stragglers=stragglers), Offers.pick
        )

    return SagaRun(Some, Ordered(order="o"))


def test_the_first_branch_that_is_done_is_enough_and_the_others_are_undone_meanwhile() -> None:
    run = offers("any").succeeds(step="second")
    assert run.sent == [Pick(order="o")]
    run.succeeds(step="first")
    assert run.sent == [CallBack(parcel="1", label=None)]
    run.declines("no", step="third").succeeds(step="pick")
    assert run.status == "running"  # first is being undone
    assert run.succeeds(step="first").status == "completed"
    assert run.instance.steps["second"].status is StepStatus.SUCCEEDED


def test_a_branch_that_fails_is_undone_alone_while_enough_are_left() -> None:
    run = offers(2).declines("no", step="first")
    assert (run.status, run.reason) == (Status.RUNNING, None)
    run.succeeds(step="second").succeeds(step="third")
    assert run.sent == [Pick(order="o")]
    assert run.succeeds().status == "completed"


def test_when_too_few_branches_are_left_the_saga_turns_back() -> None:
    run = offers(2).succeeds(step="first").declines("no", step="second").declines("nor I", step="third")
    assert run.reason == "third declined: nor I"
    assert run.sent == [CallBack(parcel="1", label=None)]
    assert run.succeeds().status == "compensated"


def test_stragglers_can_be_kept_and_the_end_waits_for_them() -> None:
    run = offers("any", "keep").succeeds(step="first").succeeds(step="pick")
    assert run.status == "running"
    run.declines("no", step="second").succeeds(step="third")
    assert run.status == "completed"
    assert run.instance.steps["third"].status is StepStatus.SUCCEEDED


def test_stragglers_can_be_waited_for() -> None:
    run = offers("any", "wait").succeeds(step="first")
    assert run.sent == []
    run.fails(step="second")
    assert run.sent == [CallBack(parcel="2", label=None)]
    run.succeeds(step="third")
    assert run.sent == []
    run.succeeds(step="second")
    assert run.sent == [Pick(order="o")]


def test_a_late_success_of_a_branch_that_was_undone_is_undone_while_the_saga_goes_on() -> None:
    run = offers(2).fails(step="first").succeeds(step="first")
    run.succeeds(step="second")
    run.replies("first", DO, SUCCEEDED)
    assert run.status == "running"
    assert run.sent == [CallBack(parcel="1", label=None)]
    run.succeeds(step="third").succeeds(step="pick")
    assert run.status == "running"
    assert run.succeeds(step="first").status == "completed"


def test_what_fails_after_enough_branches_turns_back_all_that_was_done() -> None:
    run = offers("any").succeeds(step="second").declines("no", step="pick")
    run.succeeds(step="first").declines("no", step="third")
    assert run.status == "compensating"
    run.succeeds(step="first").succeeds(step="second")
    assert run.status == "compensated"


def test_a_branch_that_cannot_be_undone_calls_a_person_when_all_else_is_done() -> None:
    run = offers("any").fails(step="first").fails(step="first").succeeds(step="second").declines("no", step="third")
    run.succeeds(step="pick")
    assert run.status == "needs_attention"
    assert run.acts(Verb.SKIP, "first").status == "completed"


@pytest.mark.parametrize("needed", [0, 4, True, "some"])
def test_a_number_of_branches_that_cannot_be_is_refused(needed: Any) -> None:
    with pytest.raises(DefinitionError, match="needed is 'all', 'any' or a number up to 3"):
        parallel(Offers.first, Offers.second, Offers.third, needed=needed)


def test_a_sequence_can_be_undone_all_at_once() -> None:
    class Swift(Offers):
        """Undone side by side."""

        flow = sequence(Offers.first, Offers.second, Offers.third, Offers.pick, undo="side_by_side")

    run = SagaRun(Swift, Ordered(order="o")).succeeds().succeeds().succeeds().declines("no")
    assert [command.parcel for command in run.sent if isinstance(command, CallBack)] == ["3", "2", "1"]


# Children


def child() -> SagaRun:
    return SagaRun(Packing, Pack(order="o"))


def told(run: SagaRun) -> list[tuple[Direction, int, Result]]:
    return [(each.direction, each.attempt, each.result) for each in run.answered]


def test_a_child_that_completes_tells_its_parent_what_it_publishes() -> None:
    run = child().succeeds()
    assert told(run) == [(DO, 1, SUCCEEDED)]
    assert run.answered[0].message == Packed(order="o")
    assert run.published == [Packed(order="o")]


def test_a_child_that_is_compensated_declines() -> None:
    run = child().declines("there is none")
    assert told(run) == [(DO, 1, DECLINED)]
    assert run.answered[0].message.model_dump()["reason"] == "pick declined: there is none"


def test_a_parent_that_turns_back_has_its_child_undone() -> None:
    run = child().succeeds().is_recalled()
    assert (run.status, run.sent) == (Status.COMPENSATING, [PutBack(order="o")])
    run.succeeds()
    assert told(run) == [(DO, 1, SUCCEEDED), (UNDO, 1, SUCCEEDED)]


def test_a_child_that_is_still_running_is_undone_and_says_so_once() -> None:
    run = child().is_recalled().succeeds()
    assert run.sent == [PutBack(order="o")]
    assert told(run.succeeds()) == [(UNDO, 1, SUCCEEDED)]
    assert told(run.is_recalled(2)) == [(UNDO, 1, SUCCEEDED), (UNDO, 2, SUCCEEDED)]


def test_a_child_that_could_not_be_undone_answers_when_a_person_has_seen_to_it() -> None:
    run = child().succeeds().is_recalled().fails()
    assert (run.status, told(run)) == (Status.NEEDS_ATTENTION, [(DO, 1, SUCCEEDED)])
    run.acts(Verb.SKIP, "pick")
    assert told(run)[-1] == (UNDO, 1, SUCCEEDED)


def test_a_child_past_its_pivot_cannot_be_undone_and_says_so() -> None:
    class Final(Packing):
        """Has a point of no return."""

        @step(pivot=True)
        def seal(self) -> Pick:
            return Pick(order="seal")

        flow = sequence(Packing.pick, seal)

    run = SagaRun(Final, Pack(order="o")).succeeds().succeeds().is_recalled()
    assert told(run) == [(DO, 1, SUCCEEDED), (UNDO, 1, FAILED)]
    assert run.status == "completed"
