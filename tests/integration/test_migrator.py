"""Instances in a database that are taken over into another version, beside the coordinators that run them."""

from typing import Self, TypedDict

import pytest

from coordinator import Saga, Status, migrates, parallel, starts_on, step
from coordinator import migrator as migrator_module
from coordinator.migrator import Migrator, Report
from coordinator.operator import Operator
from coordinator.sagas import Sagas
from coordinator.store import Store
from coordinator.tables import saga_history
from events.errors import ConfigurationError
from events.failpoints import armed
from events.message import Command
from handlers.tables import retry
from tests.support.engines import Coordinator, Hold, World, reply, wanted
from tests.support.flows import count_rows, until
from tests.support.sagas import BookHotel, PayTrip, Trip, TripWanted


class By(TypedDict):
    by: str
    why: str


BY: By = {"by": "ada", "why": "the new prices"}


class Blob(Command):
    """Only bytes that are UTF-8 can be written as JSON."""

    data: bytes


class Later(Saga, name="trip", version=2):
    """Hotel and payment at the same time; some trips cannot be taken over."""

    trip: str

    @starts_on(TripWanted)
    @classmethod
    def wanted(cls, event: TripWanted) -> Self:
        return cls(trip=event.trip)

    @migrates(1)
    @classmethod
    def taken_over(cls, old: Trip) -> Self:
        if old.trip.startswith("old"):
            raise ValueError("its customer wants it as it was")
        return cls(trip=old.trip)

    @step(timeout=10)
    def hotel(self) -> BookHotel:
        return BookHotel(trip=self.trip)

    @hotel.compensation
    def cancel_hotel(self) -> BookHotel:
        return BookHotel(trip=self.trip)

    @step
    def payment(self) -> PayTrip | Blob:
        return Blob(data=b"\xff") if self.trip.startswith("bad") else PayTrip(trip=self.trip)

    flow = parallel(hotel, payment)


class Back(Trip, name="trip", version=1):
    """Version 1, with the way back from version 2."""

    @migrates(2)
    @classmethod
    def taken_back(cls, old: Later) -> Self:
        return cls(trip=old.trip)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrator_module, "_BATCH", 3)


def operator_of(coordinator: Coordinator) -> Operator:
    return Operator(coordinator.engine, coordinator.store, coordinator.clock)


async def versions_of(world: World, *keys: str) -> list[int]:
    return [(await world.instance(key)).version for key in keys]


def reasons(report: Report) -> dict[str, int]:
    return {reason: len(ids) for reason, ids in report.stay.items()}


async def test_all_that_have_not_ended_are_taken_over_and_who_and_why_is_kept(world: World) -> None:
    coordinator = await world.coordinator(Trip, retired=[Later])
    keys = [f"t-{number}" for number in range(5)]
    await coordinator.take(*(wanted(key) for key in (*keys, "old-1", "old-2")))
    store = Store(world.engine, world.clock)
    before = await count_rows(world.engine, saga_history)
    sagas = Sagas([Trip.definition, Later.definition], application="tests")
    rehearsed = await Migrator(sagas, store).rehearse("trip", 2)
    refusal = "taken_over raised ValueError('its customer wants it as it was')"
    assert (rehearsed.moved, reasons(rehearsed)) == (5, {refusal: 2})
    assert await versions_of(world, *keys) == [1] * 5
    assert await count_rows(world.engine, saga_history) == before, "a rehearsal leaves nothing behind"

    assert await operator_of(coordinator).migrate("trip", 2, **BY) == rehearsed
    assert await versions_of(world, *keys, "old-1", "old-2") == [2] * 5 + [1] * 2
    rows = await store.history((await world.instance("t-0")).id)
    assert [(row.kind, row.actor, row.why) for row in rows][1:] == [("migrated", "ada", "the new prices")]
    assert len(await world.sent("pay.trip")) == 5, "what begins at once in the new version is sent"
    again = await operator_of(coordinator).migrate("trip", 2, **BY)
    assert (again.moved, reasons(again)) == (0, {refusal: 2})


async def test_a_migrated_instance_ends_in_its_new_version(world: World) -> None:
    coordinator = await world.coordinator(Trip, retired=[Later])
    await coordinator.take(wanted())
    saga = (await world.instance()).id
    await operator_of(coordinator).migrate("trip", 2, **BY)
    await coordinator.take(reply(saga, "hotel"), reply(saga, "payment"))
    assert (await world.instance()).status is Status.COMPLETED
    assert (await operator_of(coordinator).migrate("trip", 1, **BY)).moved == 0, "it has ended"


async def test_instances_go_back_to_the_version_before(world: World) -> None:
    coordinator = await world.coordinator(Back, retired=[Later])
    newer = await world.coordinator(Later)
    await coordinator.engine.stop()
    await newer.take(wanted("t-1"), wanted("t-2"))
    await newer.take(reply((await world.instance("t-2")).id, "payment"))
    report = await operator_of(coordinator).migrate("trip", 1, **BY)
    assert reasons(report) == {
        "flight stands before what has begun already: let taken_back count it as passed, or wait": 2
    }


async def test_what_cannot_be_stored_stays_and_holds_up_no_other(world: World) -> None:
    coordinator = await world.coordinator(Trip, retired=[Later])
    await coordinator.take(*(wanted(key) for key in ("t-1", "bad", "t-2")))
    report = await operator_of(coordinator).migrate("trip", 2, **BY)
    assert report.moved == 2
    [reason] = report.stay
    assert reason.startswith("what follows cannot be stored")
    assert await versions_of(world, "t-1", "bad", "t-2") == [2, 1, 2]
    assert await world.history("bad") == ["started"]


async def test_only_as_many_as_were_asked_for_are_looked_at(world: World) -> None:
    coordinator = await world.coordinator(Trip, retired=[Later])
    await coordinator.take(*(wanted(f"t-{number}") for number in range(6)))
    operator = operator_of(coordinator)
    assert (await operator.migrate("trip", 2, **BY, limit=4)).moved == 4
    assert (await operator.migrate("trip", 2, **BY)).moved == 2


async def test_a_migration_needs_a_known_version_and_a_reason(world: World) -> None:
    coordinator = await world.coordinator(Trip)
    operator = operator_of(coordinator)
    with pytest.raises(ConfigurationError, match="no saga trip version 2; it has: trip 1"):
        await operator.migrate("trip", 2, **BY)
    with pytest.raises(ConfigurationError, match="say who does this, and why"):
        await operator.migrate("trip", 1, by="ada", why=" ")


async def test_replies_that_were_held_for_the_old_version_are_taken_by_who_has_the_new_one(world: World) -> None:
    both = await world.coordinator(Trip, Later)
    await both.take(wanted())
    saga = (await world.instance()).id
    await both.engine.stop()
    older = await world.coordinator(Trip)
    await older.take(reply(saga, "hotel"), reply(saga, "payment"))
    await older.engine.stop()
    assert await count_rows(world.engine, retry) == 2

    class Latest(Later, name="trip", version=3):
        @migrates(2)
        @classmethod
        def latest(cls, old: Later) -> Self:
            return cls(trip=old.trip)

    newest = await world.coordinator(Latest)
    everything = await world.coordinator(Later, Latest)
    await everything.engine.stop()
    await operator_of(everything).migrate("trip", 3, **BY)
    assert [version for _, version in newest.engine.sagas.by_version] == [3]
    world.clock.advance(31)

    async def has_ended() -> bool:
        return (await world.instance()).status is Status.COMPLETED

    await until(has_ended)
    assert await count_rows(world.engine, retry) == 0


@pytest.mark.postgres
async def test_a_reply_that_is_being_decided_on_meanwhile_is_decided_on_again(shared: World) -> None:
    """It was read with the old version, and must not write that over the new one."""
    coordinator = await shared.coordinator(Trip, Later)
    await coordinator.engine.stop()
    older = await shared.coordinator(Trip)
    await older.take(wanted())
    saga, hold = (await shared.instance()).id, Hold()
    both = await shared.coordinator(Trip, retired=[Later], apart=True)
    with armed("engine.before_commit", hold):
        both.give(reply(saga, "hotel"))
        await hold.reached()
    mover = await shared.coordinator(Trip, Later, apart=True)
    report = await operator_of(mover).migrate("trip", 2, **BY)
    assert report.moved == 1
    hold.release()
    await both.settled()
    instance = await shared.instance()
    assert (instance.version, instance.steps["hotel"].status) == (2, "succeeded")
    assert await shared.history() == ["started", "migrated", "reply"]
