"""Waits, fan-outs and children in the store: on both databases, and side by side on PostgreSQL."""

import logging
from typing import Any, Self
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Table, func, select

from coordinator.decision import Verb
from coordinator.definition import Saga
from coordinator.facts import child_id
from coordinator.flow import each, sequence
from coordinator.instance import Instance, Status, StepStatus
from coordinator.operator import Operator
from coordinator.reruns import rerun
from coordinator.search import Query
from coordinator.steps import starts_on, step
from coordinator.store import Store
from coordinator.tables import parked_event, saga_history, saga_instance, saga_item, saga_wait
from coordinator.timers import find_timers
from coordinator.views import document_of
from coordinator.waiting import ParkedEvent, Waiters, correlations
from coordinator.waits import awaits, delay
from events.database import transaction
from events.derive import derive_id
from events.envelope import Direction, Envelope, Result, SagaLink, wrap
from events.message import Command, Event, Failed, Message, Refused, Reply, Succeeded
from tests.support.engines import SMALL, Coordinator, World, actions, envelope_of
from tests.support.flows import START, count_rows, until
from tests.support.packing import Pack, Packing, Unpack

DO, UNDO = Direction.DO, Direction.UNDO


class Ordered(Event):
    order: str
    parcels: int = 0


class Paid(Event):
    order: str
    payment: str


class Audited(Event):
    payment: str


class Reserve(Command):
    order: str


class Release(Command):
    order: str


class ShipParcel(Command):
    parcel: int


class CallBack(Command):
    parcel: int


class Labelled(Reply):
    label: str


class Waiting(Saga):
    """Waits for a payment, found by its key, and for the audit of it, found by something else."""

    order: str
    payment: str = ""

    @starts_on(Ordered)
    @classmethod
    def ordered(cls, event: Ordered) -> Self:
        return cls(order=event.order)

    @step
    def reserve(self) -> Reserve:
        return Reserve(order=self.order)

    @reserve.compensation
    def release(self) -> Release:
        return Release(order=self.order)

    @awaits(Paid, by="order", timeout=3600)
    def paid(self, event: Paid) -> None:
        self.payment = event.payment

    @awaits(Audited, by="payment", keep=100)
    def audited(self, event: Audited) -> None: ...

    @delay
    def rest(self) -> int:
        return 50

    flow = sequence(reserve, paid, audited, rest)


class Strict(Saga):
    """What comes early is a dead letter here, or nothing."""

    order: str
    payment: str = "p-1"

    @starts_on(Ordered)
    @classmethod
    def ordered(cls, event: Ordered) -> Self:
        return cls(order=event.order)

    @awaits(Paid, by="order", early="dead_letter")
    def paid(self, event: Paid) -> None: ...

    @awaits(Audited, by="payment", early="ignore")
    def audited(self, event: Audited) -> None: ...

    flow = sequence(paid, audited)


class Instalments(Saga):
    """Waits for two events of one type, one after the other."""

    order: str
    paid: str = ""

    @starts_on(Ordered)
    @classmethod
    def ordered(cls, event: Ordered) -> Self:
        return cls(order=event.order)

    @awaits(Paid, by="order")
    def first(self, event: Paid) -> None:
        self.paid += event.payment

    @awaits(Paid, by="order")
    def second(self, event: Paid) -> None:
        self.paid += event.payment

    flow = sequence(first, second)


class Hopeless(Saga):
    """What it does with one of its events cannot be sent."""

    order: str

    @starts_on(Ordered)
    @classmethod
    def ordered(cls, event: Ordered) -> Self:
        return cls(order=event.order)

    @awaits(Paid, by="order")
    def paid(self, event: Paid) -> None: ...

    @step
    def reserve(self) -> Reserve:
        return Reserve(order="x" * SMALL.body if self.order == "bad" else self.order)

    flow = sequence(paid, reserve)


class Delivery(Saga):
    """Many parcels, three at a time."""

    order: str
    parcels: int
    labels: int = 0

    @starts_on(Ordered)
    @classmethod
    def ordered(cls, event: Ordered) -> Self:
        return cls(order=event.order, parcels=event.parcels)

    def numbers(self) -> list[int]:
        return list(range(self.parcels))

    @step(timeout=60)
    def ship(self, item: int) -> ShipParcel:
        return ShipParcel(parcel=item)

    @ship.succeeded
    def labelled(self, item: int, outcome: Labelled) -> None:
        self.labels += 1 if outcome.label and item >= 0 else 0

    @ship.compensation
    def call_back(self, item: int) -> CallBack:
        return CallBack(parcel=item)

    flow = sequence(each(numbers, ship, limit=3))


class Dated(Delivery, deadline=86_400):
    """Parcels that have a day, of which one may take a minute."""


class Posting(Saga):
    """Parcels that are shipped whatever comes, once they are paid for."""

    order: str
    parcels: int

    @starts_on(Ordered)
    @classmethod
    def ordered(cls, event: Ordered) -> Self:
        return cls(order=event.order, parcels=event.parcels)

    @step(pivot=True)
    def charge(self) -> Reserve:
        return Reserve(order=self.order)

    def numbers(self) -> list[int]:
        return list(range(self.parcels))

    @step(timeout=60)
    def ship(self, item: int) -> ShipParcel:
        return ShipParcel(parcel=item)

    flow = sequence(charge, each(numbers, ship))


class Parent(Saga):
    """Has a child."""

    order: str

    @starts_on(Ordered)
    @classmethod
    def ordered(cls, event: Ordered) -> Self:
        return cls(order=event.order)

    @step(timeout=600)
    def pack(self) -> Pack:
        return Pack(order=self.order)

    @pack.compensation
    def unpack(self) -> Unpack:
        return Unpack(order=self.order)

    @step(timeout=600)
    def reserve(self) -> Reserve:
        return Reserve(order=self.order)

    flow = sequence(pack, reserve)


def answer(command: Envelope, outcome: Message | None = None, result: Result = Result.SUCCEEDED) -> Envelope:
    """The reply to a command."""
    link = command.saga
    assert link is not None
    return envelope_of(outcome or Succeeded(), SagaLink(link.saga_id, link.step, link.direction, link.attempt, result))


async def rows(world: World, table: Table) -> int:
    return await count_rows(world.engine, table)


# Waits


async def begin(world: World, coordinator: Coordinator, order: str = "o-1") -> None:
    await coordinator.take(envelope_of(Ordered(order=order)))
    [reserve] = [each for each in await world.sent("reserve") if b'"' + order.encode() + b'"' in each.data]
    await coordinator.take(answer(reserve))


async def test_an_event_moves_the_saga_that_waits_for_it_and_no_other(world: World) -> None:
    coordinator = await world.coordinator(Waiting)
    await begin(world, coordinator)
    await begin(world, coordinator, "o-2")
    assert await rows(world, saga_wait) == 2
    await coordinator.take(envelope_of(Paid(order="o-2", payment="p-2")))
    assert (await world.instance("o-2")).steps["paid"].status is StepStatus.SUCCEEDED
    assert (await world.instance("o-1")).steps["paid"].status is StepStatus.WAITING
    await coordinator.take(envelope_of(Audited(payment="p-2")))
    world.clock.advance(50)
    await coordinator.engine.deadlines.fire()
    assert (await world.instance("o-2")).status is Status.COMPLETED
    assert await world.history("o-2") == ["started", "reply", "event", "event", "deadline"]
    assert await rows(world, saga_wait) == 1


async def test_an_early_event_waits_for_its_saga_and_is_handed_over_once(world: World) -> None:
    coordinator = await world.coordinator(Waiting)
    early = envelope_of(Paid(order="o-1", payment="p-1"))
    await coordinator.take(envelope_of(Audited(payment="p-1")), early)
    await coordinator.take(early)  # a duplicate
    assert await rows(world, parked_event) == 2
    await begin(world, coordinator)

    async def both_are_handed_over() -> bool:
        return await rows(world, parked_event) == 0

    await until(both_are_handed_over)
    at = (await world.instance("o-1")).steps
    assert (at["paid"].status, at["rest"].status) == (StepStatus.SUCCEEDED, StepStatus.WAITING)
    assert await rows(world, saga_wait) == 0


async def test_an_early_event_that_nobody_waits_for_in_time_is_dropped_with_a_word(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = await world.coordinator(Waiting)
    await coordinator.take(envelope_of(Audited(payment="p-9")))
    world.clock.advance(101)

    async def is_gone() -> bool:
        world.clock.advance(1)  # it may have gone to sleep just now
        return await rows(world, parked_event) == 0

    await until(is_gone)
    assert "engine.parked_expired" in actions(caplog)


async def test_an_event_for_an_archived_saga_is_neither_parked_nor_dead(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """It would have waited for it by its business key, which is all that is left of it."""
    coordinator = await world.coordinator(Waiting)
    await begin(world, coordinator)
    async with transaction(world.engine) as connection:
        for part in (saga_wait, saga_history):
            await connection.execute(part.delete())
        archived = saga_instance.update().values(status="archived", state={}, steps={}, due_at=None)
        await connection.execute(archived)
    caplog.set_level("INFO")
    await coordinator.take(envelope_of(Paid(order="o-1", payment="p-1")))
    assert "saga.archived_event" in actions(caplog)
    assert await rows(world, parked_event) == 0
    assert await world.dead() == {}
    assert (await world.instance("o-1")).status == "archived"


async def test_an_event_for_a_saga_that_is_past_it_is_noted_there(world: World) -> None:
    coordinator = await world.coordinator(Waiting)
    await begin(world, coordinator)
    await coordinator.take(envelope_of(Paid(order="o-1", payment="p-1")))
    await coordinator.take(envelope_of(Paid(order="o-1", payment="p-1 again")))
    assert await world.history("o-1") == ["started", "reply", "event", "late_event"]
    assert (await world.instance("o-1")).state["payment"] == "p-1"
    assert await rows(world, parked_event) == 0


async def test_early_events_can_be_dead_letters_or_ignored(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    coordinator = await world.coordinator(Strict)
    await coordinator.take(envelope_of(Paid(order="o-1", payment="p")), envelope_of(Audited(payment="p-1")))
    assert set((await world.dead()).values()) == {"early"}
    assert "saga.early_event" in actions(caplog)
    assert await rows(world, parked_event) == 0


async def test_an_event_in_one_batch_with_the_start_of_its_saga_is_not_early(world: World) -> None:
    """Neither dead nor ignored, as if it had come in the next one."""
    coordinator = await world.coordinator(Strict)
    await coordinator.take(envelope_of(Ordered(order="o-1")), envelope_of(Paid(order="o-1", payment="p")))

    async def is_taken() -> bool:
        return (await world.instance("o-1")).steps["paid"].status is StepStatus.SUCCEEDED

    await until(is_taken)
    assert await world.dead() == {}
    assert await rows(world, parked_event) == 0


async def test_a_dead_letter_of_an_early_event_finds_its_saga_when_it_is_delivered_again(world: World) -> None:
    coordinator = await world.coordinator(Strict)
    early = envelope_of(Paid(order="o-1", payment="p"))
    await coordinator.take(early)
    await coordinator.take(envelope_of(Ordered(order="o-1")))
    await coordinator.take(early)
    assert (await world.instance("o-1")).steps["paid"].status is StepStatus.SUCCEEDED


async def test_an_early_event_whose_consequences_cannot_be_stored_is_a_dead_letter_and_spoils_no_other(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = await world.coordinator(Hopeless)
    await coordinator.take(envelope_of(Paid(order="bad", payment="p")), envelope_of(Paid(order="good", payment="p")))
    await coordinator.take(envelope_of(Ordered(order="bad")), envelope_of(Ordered(order="good")))

    async def both_are_gone() -> bool:
        return await rows(world, parked_event) == 0

    await until(both_are_gone)
    assert (await world.instance("good")).status is Status.RUNNING
    assert [each.type for each in await world.sent()] == ["reserve"]
    assert list((await world.dead()).values()) == ["too_large"]
    assert "engine.batch_split" in actions(caplog)


async def test_a_wait_that_is_called_off_waits_no_more(world: World) -> None:
    coordinator = await world.coordinator(Waiting)
    await begin(world, coordinator)
    world.clock.advance(3600)
    await coordinator.engine.deadlines.fire()
    assert await rows(world, saga_wait) == 0
    [release] = await world.sent("release")
    await coordinator.take(answer(release))
    assert (await world.instance("o-1")).status is Status.COMPENSATED


@pytest.mark.parametrize("together", [True, False])
async def test_each_of_two_events_is_for_the_part_that_waits_then(world: World, *, together: bool) -> None:
    """Whether they come in one batch or not."""
    coordinator = await world.coordinator(Instalments)
    await coordinator.take(envelope_of(Ordered(order="o-1")))
    events = [envelope_of(Paid(order="o-1", payment=payment)) for payment in ("a", "b", "c")]
    for batch in [events] if together else [[event] for event in events]:
        await coordinator.take(*batch)
    instance = await world.instance("o-1")
    assert (instance.status, instance.state["paid"]) == (Status.COMPLETED, "ab")
    assert await world.history("o-1") == ["started", "event", "event", "late_event"]
    assert await rows(world, parked_event) == 0
    document = document_of(instance, await coordinator.store.history(instance.id))
    assert rerun([Instalments.definition], document) is None


async def test_of_two_early_events_each_finds_its_part(world: World) -> None:
    coordinator = await world.coordinator(Instalments)
    await coordinator.take(*(envelope_of(Paid(order="o-1", payment=payment)) for payment in ("a", "a")))
    await coordinator.take(envelope_of(Ordered(order="o-1")))

    async def are_handed_over() -> bool:
        return await rows(world, parked_event) == 0

    await until(are_handed_over)
    assert (await world.instance("o-1")).state["paid"] == "aa"
    assert await world.history("o-1") == ["started", "event", "event"]


async def test_an_early_event_that_one_before_it_has_taken_the_place_of_is_kept(world: World) -> None:
    coordinator = await world.coordinator(Waiting)
    await coordinator.take(*(envelope_of(Audited(payment="p-1")) for _ in range(2)))
    await begin(world, coordinator)
    await coordinator.take(envelope_of(Paid(order="o-1", payment="p-1")))

    async def one_is_handed_over() -> bool:
        return await rows(world, parked_event) == 1

    await until(one_is_handed_over)
    assert await world.history("o-1") == ["started", "reply", "event", "event"]


async def test_early_events_are_dropped_in_time_however_many_there_are(world: World) -> None:
    coordinator = await world.coordinator(Waiting)
    await coordinator.take(*(envelope_of(Audited(payment=f"p-{number}")) for number in range(600)))
    world.clock.advance(101)

    async def are_being_dropped() -> bool:
        world.clock.advance(1)
        return await rows(world, parked_event) < 600

    async def are_gone() -> bool:
        return await rows(world, parked_event) == 0

    await until(are_being_dropped)
    await until(are_gone)


async def test_a_commit_looks_for_what_it_may_have_matched_and_a_sweep_for_all(world: World) -> None:
    """With very many events and waits, a look at all of them takes long."""
    gone = await world.coordinator(Waiting)
    await begin(world, gone)
    await gone.engine.stop()
    coordinator = await world.coordinator(Waiting)
    await world.clock.asleep(5)  # its first sweep is over
    missed = envelope_of(Paid(order="o-1", payment="p-1"))
    [of_key] = correlations([Waiting.definition], Paid(order="o-1", payment="p-1"))
    async with transaction(world.engine) as connection:  # who has parked it died then
        parked = [ParkedEvent(uuid4(), of_key, missed.type, missed.encode())]
        about: Any = {"begun": [], "over": [], "taken": [], "consumer": "tests", "now": world.clock.now()}
        await Waiters().write(connection, parked=parked, **about)
    await coordinator.take(envelope_of(Paid(order="o-2", payment="p-2")))
    await begin(world, coordinator, "o-2")

    async def is_past(order: str) -> bool:
        return (await world.instance(order)).steps["paid"].status is StepStatus.SUCCEEDED

    await until(lambda: is_past("o-2"))
    assert not await is_past("o-1")
    world.clock.advance(5)
    await until(lambda: is_past("o-1"))
    assert await rows(world, parked_event) == 0


async def test_an_event_and_a_wait_that_miss_each_other_are_brought_together(shared: World) -> None:
    """One process parks the event while another one, which has not seen it, begins to wait."""
    one, two = await shared.coordinator(Waiting), await shared.coordinator(Waiting, apart=True)
    await one.take(envelope_of(Ordered(order="o-1")))
    [reserve] = await shared.sent("reserve")
    one.give(answer(reserve))
    two.give(envelope_of(Paid(order="o-1", payment="p-1")))
    await one.settled()
    await two.settled()

    async def is_handed_over() -> bool:
        return (await shared.instance("o-1")).steps["paid"].status is StepStatus.SUCCEEDED

    await until(is_handed_over)
    assert await rows(shared, parked_event) == 0


# Fan-outs


async def ship_all(world: World, coordinator: Coordinator, *, declined: int | None = None) -> None:
    """Answer all that is asked for until nothing more is."""
    answered: set[str] = set()

    async def is_over() -> bool:
        sent = [each for each in await world.sent() if each.type in ("ship.parcel", "call.back")]
        fresh = [each for each in sent if each.id not in answered]
        answered.update(each.id for each in fresh)
        for command in fresh:
            number = int(command.data.decode().rpartition(":")[2].rstrip("}"))
            if command.type == "ship.parcel" and number == declined:
                coordinator.give(answer(command, Refused(reason="no"), Result.DECLINED))
            else:
                coordinator.give(answer(command, Labelled(label="l") if command.type == "ship.parcel" else None))
        await coordinator.settled()
        return not (await world.instance("o-1")).status.in_flight

    await until(is_over)


async def test_items_are_rows_and_all_of_them_are_taken_once(world: World) -> None:
    coordinator = await world.coordinator(Delivery)
    await coordinator.take(envelope_of(Ordered(order="o-1", parcels=20)))
    assert await rows(world, saga_item) == 20
    assert len(await world.sent("ship.parcel")) == 3
    assert list((await world.instance("o-1")).steps) == ["ship"]
    await ship_all(world, coordinator)
    instance = await world.instance("o-1")
    assert (instance.status, instance.state["labels"]) == (Status.COMPLETED, 20)
    assert len({each.data for each in await world.sent("ship.parcel")}) == len(await world.sent("ship.parcel")) == 20
    async with transaction(world.engine) as connection:
        counted = await connection.execute(select(saga_item.c.status, func.count()).group_by(saga_item.c.status))
        assert {row[0]: row[1] for row in counted} == {"succeeded": 20}


async def test_one_item_that_fails_has_all_others_undone(world: World) -> None:
    coordinator = await world.coordinator(Delivery)
    await coordinator.take(envelope_of(Ordered(order="o-1", parcels=300)))
    await ship_all(world, coordinator, declined=250)
    instance = await world.instance("o-1")
    assert instance.status is Status.COMPENSATED
    shipped = {each.data for each in await world.sent("ship.parcel")} - {b'{"parcel":250}'}
    assert {each.data for each in await world.sent("call.back")} == shipped
    assert len(await world.sent("call.back")) == len(shipped)


async def test_the_deadline_of_an_item_passes_for_it_alone(world: World) -> None:
    coordinator = await world.coordinator(Delivery)
    await coordinator.take(envelope_of(Ordered(order="o-1", parcels=2)))
    first = (await world.sent("ship.parcel"))[0]
    await coordinator.take(answer(first, Labelled(label="l")))
    assert list(await coordinator.store.open_items((await world.instance("o-1")).id)) == ["ship[1]"]
    for asked in (Query(), Query(step="ship"), Query(saga="delivery")):
        assert [timer.step for timer in await find_timers(coordinator.store, asked)] == ["ship[1]"]
    assert await find_timers(coordinator.store, Query(step="other")) == []
    assert await find_timers(coordinator.store, Query(), before=world.clock.now()) == []
    world.clock.advance(60)
    await coordinator.engine.deadlines.fire()
    assert (await world.instance("o-1")).reason == "ship[1] gave no answer in time"
    await ship_all(world, coordinator)
    assert (await world.instance("o-1")).status is Status.COMPENSATED


async def test_the_deadline_of_an_item_does_not_hurry_that_of_its_saga(world: World) -> None:
    coordinator = await world.coordinator(Dated)
    await coordinator.take(envelope_of(Ordered(order="o-1", parcels=2)))
    world.clock.advance(60)
    assert await coordinator.engine.deadlines.fire() == 1
    instance = await world.instance("o-1")
    assert (instance.status, instance.reason) == (Status.COMPENSATING, "ship[0] gave no answer in time")
    assert instance.updated_at == coordinator.store.clock.now()


async def test_an_item_that_fails_while_a_person_must_look_at_another_is_tried_anew(world: World) -> None:
    coordinator = await world.coordinator(Posting)
    await coordinator.take(envelope_of(Ordered(order="o-1", parcels=2)))
    [charge] = await world.sent("reserve")
    await coordinator.take(answer(charge))
    first, second = await world.sent("ship.parcel")
    await coordinator.take(answer(first, Refused(reason="no"), Result.DECLINED))
    assert (await world.instance("o-1")).status is Status.NEEDS_ATTENTION
    await coordinator.take(answer(second, Failed(code="failed", reason="no", attempts=1), Result.FAILED))
    operator = Operator(coordinator.engine, coordinator.store, world.clock)
    await operator.act("o-1", Verb.RETRY, by="ada", why="a test", step="ship[0]")
    world.clock.advance(30)
    await coordinator.engine.deadlines.fire()
    asked = [(each.saga.step, each.saga.attempt) for each in await world.sent("ship.parcel") if each.saga]
    assert asked == [("ship[0]", 1), ("ship[1]", 1), ("ship[0]", 2), ("ship[1]", 2)]


async def test_overdue_items_that_others_must_see_to_are_in_nobodys_way(world: World) -> None:
    """Of a version, say, that no process has any more."""
    coordinator, another = await world.coordinator(Delivery), await world.coordinator(Dated)
    await coordinator.take(envelope_of(Ordered(order="o-1", parcels=3)))
    world.clock.advance(1)
    await another.take(envelope_of(Ordered(order="o-2", parcels=1)))
    world.clock.advance(60)
    assert await another.engine.deadlines.fire(2) == 1


async def test_i10_two_coordinators_share_the_answers_to_one_fan_out(shared: World) -> None:
    one, two = await shared.coordinator(Delivery), await shared.coordinator(Delivery, apart=True)
    await one.take(envelope_of(Ordered(order="o-1", parcels=30)))
    answered: set[str] = set()

    async def is_over() -> bool:
        fresh = [each for each in await shared.sent("ship.parcel") if each.id not in answered]
        answered.update(each.id for each in fresh)
        for number, command in enumerate(fresh):
            (one if number % 2 else two).give(answer(command, Labelled(label="l")))
        await one.settled()
        await two.settled()
        return (await shared.instance("o-1")).status is Status.COMPLETED

    await until(is_over)
    assert (await shared.instance("o-1")).state["labels"] == 30
    assert len(await shared.sent("ship.parcel")) == 30
    await shared.history("o-1")


# Children


async def found(world: World, key: str = "o-1") -> dict[str, Instance]:
    """The instances with this business key, by saga."""
    return {each.saga: each for each in await Store(world.engine, world.clock).find(key)}


async def test_a_child_runs_on_its_own_and_its_end_is_the_answer(world: World) -> None:
    coordinator = await world.coordinator(Parent, Packing)
    await coordinator.take(envelope_of(Ordered(order="o-1")))
    [pack] = await world.sent("pack")
    await coordinator.take(pack, pack)
    [pick] = await world.sent("pick")
    await coordinator.take(answer(pick))
    [packed] = [each for each in await world.sent("packed") if each.saga is not None]
    assert packed.saga is not None
    assert (packed.saga.step, packed.saga.result) == ("pack", Result.SUCCEEDED)
    assert len([each for each in await world.sent("packed") if each.saga is None]) == 1
    await coordinator.take(packed)
    parent = (await found(world))["parent"]
    assert parent.steps["pack"].status is StepStatus.SUCCEEDED
    await coordinator.take(pack)  # once more, after its end: it is told again
    assert len({each.id for each in await world.sent("packed") if each.saga is not None}) == 1


async def test_a_parent_that_turns_back_has_its_child_undone(world: World) -> None:
    coordinator = await world.coordinator(Parent, Packing)
    await coordinator.take(envelope_of(Ordered(order="o-1")))
    [pack] = await world.sent("pack")
    await coordinator.take(pack)
    [pick] = await world.sent("pick")
    await coordinator.take(answer(pick))
    [packed] = [each for each in await world.sent("packed") if each.saga is not None]
    await coordinator.take(packed)
    [reserve] = await world.sent("reserve")
    await coordinator.take(answer(reserve, Refused(reason="none left"), Result.DECLINED))
    [unpack] = await world.sent("unpack")
    await coordinator.take(unpack)
    [put_back] = await world.sent("put.back")
    await coordinator.take(answer(put_back))
    undone = [each for each in await world.sent("succeeded") if each.saga is not None]
    assert [each.saga.direction for each in undone if each.saga] == [UNDO]
    await coordinator.take(*undone)
    assert {each.status for each in (await found(world)).values()} == {Status.COMPENSATED}


async def test_a_child_that_is_undone_before_it_begins_never_does(world: World) -> None:
    coordinator = await world.coordinator(Parent, Packing)
    await coordinator.take(envelope_of(Ordered(order="o-1")))
    [pack] = await world.sent("pack")
    world.clock.advance(600)
    await coordinator.engine.deadlines.fire()
    [unpack] = await world.sent("unpack")
    await coordinator.take(unpack)
    await coordinator.take(pack)
    assert list(await found(world)) == ["parent"]
    [undone] = await world.sent("succeeded")
    await coordinator.take(undone)
    assert (await found(world))["parent"].status is Status.COMPENSATED


async def test_a_child_that_never_begins_is_undone_as_often_as_it_is_asked_for(world: World) -> None:
    """Its parent asks again when an answer is late; another saga with the key of the child is no reason to fail."""
    coordinator = await world.coordinator(Parent, Packing)
    await coordinator.take(envelope_of(Ordered(order="o-1")), packing_of(1))
    await coordinator.take(*await world.sent("pack"))
    [refused] = await world.sent("failed")
    await coordinator.take(refused)
    [unpack] = await world.sent("unpack")
    await coordinator.take(unpack)
    await coordinator.take(unpack)
    assert await world.dead() == {}
    undone = await world.sent("succeeded")
    assert len({each.id for each in undone}) == 1 < len(undone)
    await coordinator.take(undone[0])
    assert (await found(world))["parent"].status is Status.COMPENSATED


def packing_of(parent: int) -> Envelope:
    """The command for a child of some parent."""
    link = SagaLink(UUID(int=parent << 80), "pack", DO, 1)
    return wrap(
        Pack(order="o-1"),
        id=str(derive_id(link.saga_id, "pack", "do", 1)),
        source="/tests",
        time=START,
        saga=link,
        reply_to="coordinator",
    )


async def test_a_child_whose_key_is_taken_fails_its_parents_step(world: World) -> None:
    coordinator = await world.coordinator(Parent, Packing)
    for parent in (1, 2):
        await coordinator.take(packing_of(parent))
    assert (await found(world))["packing"].id == child_id(UUID(int=1 << 80), "pack")
    [failed] = await world.sent("failed")
    assert failed.saga is not None
    assert (failed.saga.saga_id, failed.saga.result) == (UUID(int=2 << 80), Result.FAILED)
