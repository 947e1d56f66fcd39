"""Recorded sagas, decided on again by the code that they were recorded with, and by code that has changed since."""

import json
from dataclasses import replace
from typing import Any, Self

import pytest

from coordinator import Saga, compensated, each, migrates, parallel, sequence, starts_on, step
from coordinator.decision import Verb
from coordinator.deviations import Weight
from coordinator.exports import export, read
from coordinator.instance import Status
from coordinator.operator import Operator
from coordinator.reruns import UnclearError, Verdict, rerun
from coordinator.search import Query
from events.envelope import Direction, Envelope, Result
from events.errors import ConfigurationError
from events.message import Refused
from tests.integration.test_engine_flows import Ordered as PackingOrdered
from tests.integration.test_engine_flows import Parent
from tests.support.engines import Coordinator, World, envelope_of, open_world, reply, wanted
from tests.support.flows import until
from tests.support.packing import Packing as Child
from tests.support.packing import Pick, PutBack
from tests.support.sagas import (
    BookFlight,
    BookHotel,
    CancelHotel,
    FlightBooked,
    FlightFull,
    PayTrip,
    Trip,
    TripOff,
    TripWanted,
)
from tests.unit.test_fan_out import CallBack, Delivery, Labelled, ShipParcel
from tests.unit.test_fan_out import Ordered as Parcels
from tests.unit.test_waits import Ordered, Paid, Prepaid

ALL = Query(statuses=tuple(Status))


class Taken(Trip, name="trip", version=2):
    """The next version, to which some are taken over."""

    @migrates(1)
    @classmethod
    def taken_over(cls, old: Trip) -> Self:
        return cls.from_state(old.to_state())


async def documents(coordinator: Coordinator) -> list[dict[str, Any]]:
    """What an export holds, through the letters that it is written with."""
    found = [json.dumps(document) async for document in export(coordinator.store, ALL)]
    return list(read(found))


def verdict(documents: list[dict[str, Any]], *sagas: type[Saga]) -> Verdict:
    made = Verdict()
    for document in documents:
        made.take([saga.definition for saga in sagas], document)
    return made


async def lived(world: World) -> list[dict[str, Any]]:
    """Sagas that have lived through all sorts of things."""
    coordinator = await world.coordinator(Trip, retired=[Taken])
    operator = Operator(coordinator.engine, coordinator.store, coordinator.clock)
    await coordinator.take(wanted("moved"))
    moved = (await world.instance("moved")).id
    await coordinator.take(reply(moved, "hotel"))
    await operator.migrate("trip", 2, by="ada", why="a test")
    await coordinator.take(reply(moved, "flight", FlightBooked(ticket="t-8")))

    keys = ["new", "booked", "full", "silent", "cancelled", "unknown", "broken"]
    await coordinator.take(*(wanted(key, "flight") if key == "broken" else wanted(key) for key in keys))
    ids = {key: (await world.instance(key)).id for key in keys}
    await coordinator.take(*(reply(ids[key], "hotel") for key in keys if key not in ("new", "silent")))
    await coordinator.take(
        reply(ids["booked"], "flight", FlightBooked(ticket="t-9")),
        reply(ids["full"], "flight", FlightFull(trip="full", reason="nobody flies"), Result.DECLINED),
    )
    await coordinator.take(
        reply(ids["full"], "hotel", direction=Direction.UNDO), reply(ids["full"], "hotel"), reply(ids["booked"], "no")
    )
    await operator.act(ids["cancelled"], Verb.CANCEL, by="ada", why="a test")
    for _ in range(12):
        world.clock.advance(25)
        while await coordinator.engine.deadlines.fire():
            pass
    return await documents(coordinator)


async def test_the_code_that_has_decided_decides_the_same_again(world: World) -> None:
    recorded = await lived(world)
    made = verdict(recorded, Trip, Taken)
    assert (made.same, made.broken, made.unclear) == (8, [], {})
    kinds = {row["kind"] for document in recorded for row in document["history"]}
    assert kinds >= {"started", "reply", "late_reply", "deadline", "cancel", "migrated"}


class Cheaper(Trip, name="trip"):
    """Another command for the flight."""

    @step(timeout=20, resends=2)
    def flight(self) -> PayTrip:
        return PayTrip(trip=self.trip)

    flow = sequence(Trip.hotel, flight, Trip.payment)


class Slower(Trip, name="trip"):
    """Only deadlines have changed."""

    @step(timeout=1000)
    def hotel(self) -> BookHotel:
        return BookHotel(trip=self.trip)

    @hotel.compensation(timeout=5, resends=1)
    def cancel_hotel(self) -> CancelHotel:
        return CancelHotel(trip=self.trip)

    flow = sequence(hotel, Trip.flight, Trip.payment)


class Forgetful(Trip, name="trip"):
    """The ticket is not kept any more."""

    @step(timeout=20, resends=2)
    def flight(self) -> BookFlight:
        return BookFlight(trip=self.trip)

    @flight.succeeded
    def booked(self, outcome: FlightBooked) -> None:
        assert outcome.ticket

    @flight.compensation
    def cancel_flight(self) -> CancelHotel:
        return CancelHotel(trip=self.trip)

    flow = sequence(Trip.hotel, flight, Trip.payment)


class Strict(Trip, name="trip"):
    """A method raises that did not."""

    @step(timeout=20)
    def flight(self) -> BookFlight:
        raise ValueError("no flights today")

    flow = sequence(Trip.hotel, flight, Trip.payment)


class Eager(Trip, name="trip"):
    flow = sequence(parallel(Trip.hotel, Trip.flight, Trip.payment))


class Otherwise(Saga, name="trip"):
    """Its state has another field."""

    name: str

    @starts_on(TripWanted)
    @classmethod
    def wanted(cls, event: TripWanted) -> Self:
        return cls(name=event.trip)

    @step(timeout=10)
    def hotel(self) -> BookHotel:
        return BookHotel(trip=self.name)

    flow = sequence(hotel)


class Keyed(Trip, name="trip"):
    @starts_on(TripWanted)
    @classmethod
    def wanted(cls, event: TripWanted) -> Self:
        return cls(trip=f"trip {event.trip}")


@pytest.mark.parametrize(
    ("changed", "revision", "what"),
    [
        (Cheaper, 2, "it would send pay.trip for flight, not book.flight for flight"),
        (Forgetful, 3, 'state ticket would be as it was, not "t-9"'),
        (Eager, 1, "it would send book.flight for flight, book.hotel for hotel, pay.trip for payment, not book.hotel"),
        (Strict, 2, "the saga would be compensating (flight could not be asked for: flight raised ValueError("),
        (Otherwise, 1, "state faults would be as it was, not []"),
        (Keyed, 1, "its business key would be 'trip booked'"),
    ],
)
async def test_changed_code_is_told_where_a_saga_would_go_another_way_and_how(
    database_url: str, changed: type[Saga], revision: int, what: str
) -> None:
    async with open_world(database_url) as world:
        coordinator = await world.coordinator()
        await coordinator.take(wanted("booked"))
        saga = (await world.instance("booked")).id
        await coordinator.take(reply(saga, "hotel"), reply(saga, "flight", FlightBooked(ticket="t-9")))
        [document] = await documents(coordinator)
    found = rerun([changed.definition], document)
    assert found is not None
    assert (found.id, found.key, found.version, found.revision) == (str(saga), "booked", 1, revision)
    assert (found.weight, found.what[: len(what)]) == (Weight.BREAKS, what)


async def test_deadlines_may_change_without_a_break(world: World) -> None:
    recorded = await lived(world)
    assert verdict(recorded, Slower, Taken).broken == []


async def test_a_version_that_is_gone_is_a_break(world: World) -> None:
    made = verdict(await lived(world), Trip)
    assert made.same == 7
    assert [(each.key, each.what) for each in made.broken] == [("moved", "version 2 is not part of this application")]


async def test_events_that_were_waited_for_are_decided_on_again(world: World) -> None:
    coordinator = await world.coordinator(Prepaid)
    await coordinator.take(envelope_of(Ordered(order="o-1")))
    await coordinator.take(reply((await world.instance("o-1")).id, "reserve"))
    await coordinator.take(envelope_of(Paid(order="o-1", payment="p-1")))
    recorded = await documents(coordinator)
    assert [row["kind"] for row in recorded[0]["history"]] == ["started", "reply", "event"]
    made = verdict(recorded, Prepaid)
    assert (made.same, made.broken, made.unclear) == (1, [], {})


async def test_a_turn_that_was_waited_for_is_decided_on_again(world: World) -> None:
    class Alone(Trip, name="alone", lock="trip"):
        """One at a time."""

    coordinator = await world.coordinator(Alone)
    await coordinator.take(wanted("t-1"))
    recorded = await documents(coordinator)
    assert [row["kind"] for row in recorded[0]["history"]] == ["started", "granted"]
    made = verdict(recorded, Alone)
    assert (made.same, made.broken, made.unclear) == (1, [], {})


async def test_items_are_decided_on_again(world: World) -> None:
    coordinator = await world.coordinator(Delivery)
    await coordinator.take(envelope_of(Parcels(order="o-1", parcels=3)))
    saga = (await world.instance("o-1")).id
    await coordinator.take(reply(saga, "pick"))
    for number in range(3):
        await coordinator.take(reply(saga, f"ship[{number}]", Labelled(label=str(number))))
    assert (await world.instance("o-1")).status is Status.COMPLETED
    made = verdict(await documents(coordinator), Delivery)
    assert (made.same, made.broken, made.unclear) == (1, [], {})


class Insured(Delivery, name="insured"):
    """Many parcels, and something that may fail after them."""

    @step
    def insure(self) -> Pick:
        return Pick(order=self.order)

    flow = sequence(Delivery.flow, insure)


class InsuredLater(Insured, name="insured", version=2):
    @migrates(1)
    @classmethod
    def taken_over(cls, old: Insured) -> Self:
        return cls.from_state(old.to_state())


async def test_items_of_a_migrated_saga_are_undone_and_decided_on_again(world: World) -> None:
    coordinator = await world.coordinator(Insured, retired=[InsuredLater])
    await coordinator.take(envelope_of(Parcels(order="o-1", parcels=3)))
    saga = (await world.instance("o-1")).id
    await coordinator.take(reply(saga, "pick"))
    for number in range(3):
        await coordinator.take(reply(saga, f"ship[{number}]", Labelled(label=str(number))))
    operator = Operator(coordinator.engine, coordinator.store, coordinator.clock)
    assert (await operator.migrate("insured", 2, by="ada", why="a test")).moved == 1
    await coordinator.take(reply(saga, "insure", Refused(reason="too dear"), Result.DECLINED))

    async def two_are_called_back() -> bool:  # the coordinator goes on by itself
        return len(await world.sent("call.back")) == 2

    await until(two_are_called_back)
    made = verdict(await documents(coordinator), Insured, InsuredLater)
    assert (made.same, made.broken, made.unclear) == (1, [], {})


# Words


class Shouting(Trip, name="trip"):
    """Says the same, louder."""

    @step(timeout=10)
    def hotel(self) -> BookHotel:
        return BookHotel(trip=self.trip.upper())

    @hotel.compensation(timeout=5, resends=1)
    def cancel_hotel(self) -> CancelHotel:
        return CancelHotel(trip=self.trip)

    flow = sequence(hotel, Trip.flight, Trip.payment)

    @compensated
    def off(self, reason: str) -> TripOff:
        return TripOff(trip=self.trip.upper(), reason=reason)


async def test_what_is_over_and_would_be_said_otherwise_differs_and_what_is_under_way_breaks(world: World) -> None:
    coordinator = await world.coordinator()
    await coordinator.take(wanted("asked"), wanted("booked"), wanted("full"))
    ids = {key: (await world.instance(key)).id for key in ("booked", "full")}
    await coordinator.take(*(reply(each, "hotel") for each in ids.values()))
    full = FlightFull(trip="full", reason="nobody flies")
    await coordinator.take(reply(ids["full"], "flight", full, Result.DECLINED))
    recorded = await documents(coordinator)
    assert verdict(recorded, Trip).same == 3
    made = verdict(recorded, Shouting)
    assert (made.same, made.unclear) == (0, {})
    assert [(each.key, each.revision, each.weight, each.what) for each in made.broken] == [
        (
            "asked",
            1,
            Weight.BREAKS,
            'hotel is under way, and would say {"trip":"ASKED"} when it is sent again, and has not',
        )
    ]
    what = 'it would send book.hotel for hotel with {"trip":"%s"}, and has sent something else'
    assert [(each.key, each.revision, each.weight, each.what) for each in made.differing] == [
        ("booked", 1, Weight.DIFFERS, what % "BOOKED"),
        ("full", 1, Weight.DIFFERS, what % "FULL"),
    ]


async def test_events_that_would_say_something_else_differ(world: World) -> None:
    class Loud(Trip, name="trip"):
        """Only its event has changed."""

        @compensated
        def off(self, reason: str) -> TripOff:
            return TripOff(trip=self.trip.upper(), reason=reason)

    coordinator = await world.coordinator()
    await coordinator.take(wanted("full", "hotel"))
    [found] = verdict(await documents(coordinator), Loud).differing
    assert (found.revision, found.what.partition(" with ")[0]) == (1, "it would send trip.off")


class BookWithPassword(BookHotel, type="book.hotel"):
    password: str = "sesame"


class Insecure(Trip, name="trip"):
    """Its command has got a field."""

    @step(timeout=10)
    def hotel(self) -> BookHotel:
        return BookWithPassword(trip=self.trip)

    @hotel.compensation
    def cancel_hotel(self) -> CancelHotel:
        return CancelHotel(trip=self.trip)

    flow = sequence(hotel, Trip.flight, Trip.payment)


async def test_what_is_nobodys_business_is_not_shown(world: World) -> None:
    coordinator = await world.coordinator()
    await coordinator.take(wanted("t-1"))
    [found] = verdict(await documents(coordinator), Insecure).broken
    assert '{"trip":"t-1","password":"***"}' in found.what


async def test_sagas_that_were_recorded_without_words_are_judged_by_their_way(world: World) -> None:
    coordinator = await world.coordinator()
    await coordinator.take(wanted("asked"))
    [document] = await documents(coordinator)
    [sent] = document["history"][0]["sent"]
    assert sent.pop("crc32")
    assert verdict([document], Shouting).same == 1


async def test_what_was_sent_before_a_migration_must_be_the_same_when_it_is_sent_again(world: World) -> None:
    coordinator = await world.coordinator(Trip, retired=[Taken])
    await coordinator.take(wanted("moved"))
    operator = Operator(coordinator.engine, coordinator.store, coordinator.clock)
    await operator.migrate("trip", 2, by="ada", why="a test")

    class TakenAndShouting(Shouting, name="trip", version=2):
        """Taken over, and changed since."""

    class TakenAndBroken(Trip, name="trip", version=2):
        @step(timeout=10)
        def hotel(self) -> BookHotel:
            raise ValueError("no hotels today")

        flow = sequence(hotel, Trip.flight, Trip.payment)

    recorded = await documents(coordinator)
    assert verdict(recorded, Taken).same == 1
    for changed, what in (
        (TakenAndShouting, 'would say {"trip":"MOVED"} when it is sent again, and has not'),
        (TakenAndBroken, "could not be sent again: hotel could not be asked for: hotel raised ValueError("),
    ):
        [found] = verdict(recorded, changed).broken
        assert (found.revision, found.kind) == (1, "started")
        assert f"hotel is under way, and {what}" in found.what


class Relabelled(Delivery, name="delivery"):
    """Its parcels have other names."""

    @step(timeout=60)
    def ship(self, item: dict[str, str]) -> ShipParcel:
        return ShipParcel(order=self.order, parcel=item["parcel"], label="new")

    @ship.succeeded
    def labelled(self, item: dict[str, str], outcome: Labelled) -> dict[str, str]:
        self.shipped += 1
        return {**item, "label": outcome.label}

    @ship.compensation
    def call_back(self, item: dict[str, str]) -> CallBack:
        return CallBack(parcel=item["parcel"], label=item.get("label"))

    flow = sequence(Delivery.pick, each(Delivery.all_parcels, ship, limit=2))


async def test_items_under_way_must_be_the_same_when_they_are_sent_again(world: World) -> None:
    coordinator = await world.coordinator(Delivery)
    await coordinator.take(envelope_of(Parcels(order="o-1", parcels=3)))
    saga = (await world.instance("o-1")).id
    await coordinator.take(reply(saga, "pick"))
    await coordinator.take(reply(saga, "ship[0]", Labelled(label="a")), reply(saga, "ship[1]", Labelled(label="b")))
    recorded = await documents(coordinator)
    assert verdict(recorded, Delivery).same == 1
    [found] = verdict(recorded, Relabelled).broken
    assert (found.revision, found.what.partition(",")[0]) == (3, "ship[2] is under way")
    await coordinator.take(reply(saga, "ship[2]", Labelled(label="c")))
    [found] = verdict(await documents(coordinator), Relabelled).differing
    assert found.revision == 2


# Children


class Packing(Child, name="packing"):
    """As it is at work."""


class PackingAgain(Packing, name="packing", version=2):
    @migrates(1)
    @classmethod
    def taken_over(cls, old: Packing) -> Self:
        return cls.from_state(old.to_state())


async def asked_and_recalled(world: World, *, migrate: bool = False) -> list[dict[str, Any]]:
    """A child that was asked for twice more, also as a new attempt, and then undone, which was said twice."""
    coordinator = await world.coordinator(Parent, Packing, retired=[PackingAgain])
    await coordinator.take(envelope_of(PackingOrdered(order="o-1")))
    [pack] = await world.sent("pack")
    await coordinator.take(pack)
    [pick] = await world.sent("pick")
    assert pack.saga is not None
    assert pick.saga is not None
    if migrate:
        operator = Operator(coordinator.engine, coordinator.store, coordinator.clock)
        await coordinator.take(again(pack, attempt=2))
        assert (await operator.migrate("packing", 2, by="ada", why="a test")).moved == 1
        await coordinator.take(again(pack, attempt=3))
    await coordinator.take(reply(pick.saga.saga_id, "pick"))
    if not migrate:
        await coordinator.take(pack, again(pack, attempt=2))
    undo = replace(pack, type="unpack", id="m-unpack", saga=replace(pack.saga, direction=Direction.UNDO))
    await coordinator.take(undo)
    await coordinator.take(reply(pick.saga.saga_id, "pick", direction=Direction.UNDO))
    await coordinator.take(again(undo, attempt=2))
    return [each for each in await documents(coordinator) if each["saga"] == "packing"]


def again(command: Envelope, *, attempt: int) -> Envelope:
    assert command.saga is not None
    return replace(command, id=f"{command.id} {attempt}", saga=replace(command.saga, attempt=attempt), _key=None)


async def test_a_child_that_was_asked_again_and_recalled_is_decided_on_again(world: World) -> None:
    recorded = await asked_and_recalled(world)
    kinds = [row["kind"] for row in recorded[0]["history"]]
    assert kinds == ["started", "reply", "asked_again", "asked_again", "recalled", "reply", "recalled"]
    made = verdict(recorded, Parent, Packing)
    assert (made.same, made.broken, made.differing, made.unclear) == (1, [], [], {})


async def test_a_child_that_was_taken_over_between_is_decided_on_again(world: World) -> None:
    recorded = await asked_and_recalled(world, migrate=True)
    kinds = [row["kind"] for row in recorded[0]["history"]]
    assert kinds == ["started", "asked_again", "migrated", "asked_again", "reply", "recalled", "reply", "recalled"]
    made = verdict(recorded, Parent, Packing, PackingAgain)
    assert (made.same, made.broken, made.differing, made.unclear) == (1, [], [], {})


class Reserving(Packing, name="packing"):
    """Undoes with another command."""

    @step
    def pick(self) -> Pick:
        return Pick(order=self.order)

    @pick.compensation
    def put_back(self) -> Pick:
        return Pick(order=f"not {self.order}")

    flow = sequence(pick)


class Gentle(Packing, name="packing"):
    """Undoes with other words."""

    @step
    def pick(self) -> Pick:
        return Pick(order=self.order)

    @pick.compensation
    def put_back(self) -> PutBack:
        return PutBack(order=f"please {self.order}")

    flow = sequence(pick)


async def test_where_a_recalled_child_would_go_another_way_is_found(world: World) -> None:
    recorded = await asked_and_recalled(world)
    [broken] = verdict(recorded, Parent, Reserving).broken
    assert (broken.revision, broken.kind) == (5, "recalled")
    assert broken.what == "it would send pick to undo pick, not put.back to undo pick"
    [differing] = verdict(recorded, Parent, Gentle).differing
    assert (differing.revision, differing.kind) == (5, "recalled")
    assert "with " + '{"order":"please o-1"}' in differing.what


async def test_a_child_of_which_no_attempt_was_recorded_is_judged_where_there_was_one(world: World) -> None:
    recorded = await asked_and_recalled(world)
    for document in recorded:
        document["history"][0]["attempt"] = None  # as before it was recorded
    [why] = verdict(recorded, Parent, Packing).unclear
    assert why == "which attempt of its parent it was started by was not recorded"
    for document in recorded:
        document["history"] = document["history"][:2]
        document["origin"] |= {"attempt": 1, "undo_attempt": 0}
    assert verdict(recorded, Parent, Packing).same == 1


async def test_a_history_that_was_not_recorded_in_full_is_not_judged(world: World) -> None:
    coordinator = await world.coordinator()
    await coordinator.take(wanted())
    [document] = await documents(coordinator)
    document["history"][0]["input"] = None
    with pytest.raises(UnclearError, match="what was decided on in revision 1 was not recorded"):
        rerun([Trip.definition], document)
    made = verdict([document, document], Trip)
    assert made.unclear == {"what was decided on in revision 1 was not recorded": 2}


def test_a_file_that_is_no_export_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigurationError, match="line 1 is no JSON"):
        list(read(["{"]))
    with pytest.raises(ConfigurationError, match="line 1 is no saga; write the file with `coordinator sagas export`"):
        list(read(['{"id": 1}']))
