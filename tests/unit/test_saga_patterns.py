"""One scenario for each published saga pattern, from the first event to the end."""

from typing import Any, Self

import pytest

from coordinator.acts import NotPossibleError
from coordinator.decision import Verb
from coordinator.definition import Saga
from coordinator.flow import each, parallel, sequence
from coordinator.instance import Status
from coordinator.steps import Backoff, starts_on, step
from coordinator.testing import SagaRun
from coordinator.waits import awaits
from events.envelope import Direction, Result
from events.message import Command, Event
from tests.support.packing import Pack, Packed, Packing, Pick, PutBack, Unpack, Unpacked
from tests.support.trips import booking, names, run

DO, UNDO = Direction.DO, Direction.UNDO


def test_pivot_before_it_all_is_undone_and_after_it_nothing() -> None:
    """Richardson, "Microservices Patterns", section 4.3: compensatable, pivot and retriable transactions."""
    flow = (booking("seat"), booking("pay", undone=False, pivot=True), booking("ticket", undone=False))
    before = run(sequence(*flow)).succeeds().declines("no money")
    assert names(before.sent) == ["cancel seat"]
    assert before.succeeds().status is Status.COMPENSATED
    after = run(sequence(*flow)).succeeds().succeeds().declines("no paper")
    assert (after.status, after.sent) == (Status.NEEDS_ATTENTION, [])


def test_forward_recovery_tries_anew_until_it_succeeds() -> None:
    """Garcia-Molina and Salem, "Sagas", 1987, section 5."""
    ticket = booking("ticket", undone=False, recovery=Backoff(3, first=60, factor=2))
    trip = run(sequence(booking("seat"), booking("pay", undone=False, pivot=True), ticket)).succeeds().succeeds()
    for wait in (60, 120):
        trip.fails("the printer is broken")
        assert (trip.status, trip.sent) == (Status.RUNNING, [])
        assert names(trip.passes(wait - 1).sent) == []
        assert names(trip.passes(1).sent) == ["book ticket"]
    assert trip.succeeds().status is Status.COMPLETED


def test_parallel_with_one_branch_failing_undoes_each_of_the_others_in_reverse() -> None:
    flow = parallel(sequence(booking("train"), booking("hotel")), booking("flight"), booking("visa"))
    trip = run(flow).succeeds(step="train").succeeds(step="hotel").succeeds(step="flight")
    assert names(trip.declines("the passport is too old", step="visa").sent) == ["cancel flight", "cancel hotel"]
    assert names(trip.succeeds(step="hotel").sent) == ["cancel train"]
    assert trip.succeeds(step="flight").status is Status.COMPENSATING
    assert trip.succeeds(step="train").status is Status.COMPENSATED


class Invited(Event):
    party: str


class Invite(Command):
    guest: str


class Uninvite(Command):
    guest: str


class Party(Saga):
    """Invites those who come."""

    party: str

    @starts_on(Invited)
    @classmethod
    def planned(cls, event: Invited) -> Self:
        return cls(party=event.party)

    def guests(self) -> list[str]:
        return ["ann", "bob", "cid", "dan"] if self.party else []

    @step
    def invite(self, item: str) -> Invite:
        return Invite(guest=item)

    @invite.compensation
    def uninvite(self, item: str) -> Uninvite:
        return Uninvite(guest=item)

    flow = sequence(each(guests, invite, limit=2, on_failure="collect"))


def test_fan_out_with_partial_failure_goes_on_with_those_that_succeed() -> None:
    party = SagaRun(Party, Invited(party="p")).succeeds(step="invite[0]").declines("away", step="invite[1]")
    assert party.sent == [Invite(guest="dan")], "two at a time"
    assert party.fails("no line", step="invite[2]").sent == [Uninvite(guest="cid")], "he may have been told"
    party.succeeds(step="invite[3]")
    assert party.status is Status.RUNNING
    assert party.succeeds(step="invite[2]").status is Status.COMPLETED
    fan = party.instance.steps["invite"].fan
    assert fan is not None
    assert (fan.total, fan.failed, fan.stuck) == (4, 2, 0)


class OrderPlaced(Event):
    order: str


class Order(Saga):
    """The parent: has things packed, and waits for the money."""

    order: str

    @starts_on(OrderPlaced)
    @classmethod
    def placed(cls, event: OrderPlaced) -> Self:
        return cls(order=event.order)

    @step
    def pack(self) -> Pack:
        return Pack(order=self.order)

    @pack.compensation
    def unpack(self) -> Unpack:
        return Unpack(order=self.order)

    @step
    def ship(self) -> Pick:
        return Pick(order=self.order)

    flow = sequence(pack, ship)


def pass_on(child: SagaRun, parent: SagaRun) -> None:
    """Hand the child's last answer to its parent."""
    said = child.answered[-1]
    parent.replies("pack", said.direction, said.result, said.message, attempt=said.attempt)


def test_nested_child_is_compensated_with_its_parent_each_by_its_own_steps() -> None:
    parent = SagaRun(Order, OrderPlaced(order="o"))
    [command] = parent.sent
    child = SagaRun(Packing, command).succeeds()
    pass_on(child, parent)
    assert parent.declines("no van", step="ship").sent == [Unpack(order="o")]
    assert child.is_recalled().sent == [PutBack(order="o")]
    assert child.succeeds().status is Status.COMPENSATED
    pass_on(child, parent)
    assert parent.status is Status.COMPENSATED
    assert child.published == [Packed(order="o"), Unpacked(order="o", reason="its parent has turned back")]


def test_late_success_after_a_deadline_is_undone_once_more() -> None:
    trip = run(sequence(booking("seat"), booking("meal"))).succeeds().gives_no_answer()
    assert names(trip.sent) == ["cancel meal"]
    assert names(trip.succeeds(step="meal").sent) == ["cancel seat"], "it had found nothing to cancel"
    trip.replies("meal", DO, Result.SUCCEEDED).succeeds(step="seat")
    assert names(trip.sent) == ["cancel meal"]
    assert trip.succeeds(step="meal").status is Status.COMPENSATED


class Paid(Event):
    order: str


class Delivery(Saga):
    """Waits for the money after packing."""

    order: str
    paid: bool = False

    @starts_on(OrderPlaced)
    @classmethod
    def placed(cls, event: OrderPlaced) -> Self:
        return cls(order=event.order)

    @step
    def fetch(self) -> Pick:
        return Pick(order=self.order)

    @awaits(Paid, by="order")
    def money(self, _: Paid) -> None:
        self.paid = True

    flow = sequence(fetch, money)


def test_an_event_that_overtakes_what_waits_for_it_is_kept_until_then() -> None:
    """`decide` says that nothing follows from it yet; the engine parks it, and hands it over when the saga waits."""
    delivery = SagaRun(Delivery, OrderPlaced(order="o")).receives(Paid(order="o"))
    assert (delivery.last.entry.kind, delivery.instance.revision) == ("started", 1)
    delivery.succeeds()
    assert [each.step for each in delivery.last.waits] == ["money"]
    delivery.receives(Paid(order="o"))
    assert (delivery.status, delivery.saga.model_dump()["paid"]) == (Status.COMPLETED, True)
    assert delivery.receives(Paid(order="o")).last.entry.kind == "late_event"


@pytest.mark.parametrize("cancelled_first", [True, False])
def test_a_cancel_that_races_the_last_reply_undoes_all_or_is_refused(*, cancelled_first: bool) -> None:
    trip = run(sequence(booking("seat"), booking("meal"))).succeeds()
    if cancelled_first:
        trip.acts(Verb.CANCEL).succeeds(step="meal").succeeds(step="meal").succeeds(step="seat")
        assert trip.status is Status.COMPENSATED
    else:
        trip.succeeds()
        with pytest.raises(NotPossibleError, match="only a running saga can be cancelled"):
            trip.acts(Verb.CANCEL)
        assert trip.status is Status.COMPLETED


def test_of_two_operators_at_once_the_second_is_told_to_look_again() -> None:
    trip = run(sequence(booking("seat"), booking("meal"))).succeeds().declines("no").fails()
    assert trip.status is Status.NEEDS_ATTENTION
    seen: Any = trip.instance.revision
    assert names(trip.acts(Verb.RETRY, "seat", revision=seen).sent) == ["cancel seat"]
    with pytest.raises(NotPossibleError, match="the saga has moved on"):
        trip.acts(Verb.SKIP, "seat", revision=seen)
    assert trip.succeeds().status is Status.COMPENSATED
