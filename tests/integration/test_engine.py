"""What the coordinator's engine does with what it is given: on both databases, and side by side on PostgreSQL."""

import asyncio
import logging
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Self
from uuid import uuid4

import pytest
from pydantic_core import from_json
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError

from coordinator.acts import NotPossibleError
from coordinator.decision import Resolution, Verb
from coordinator.definition import Saga
from coordinator.flow import parallel, sequence, when
from coordinator.instance import Instance, Status, StepStatus
from coordinator.operator import Operator
from coordinator.steps import Backoff, starts_on, step
from coordinator.tables import saga_history, saga_instance
from events.derive import derive_id
from events.envelope import Direction, Envelope, Result, SagaLink
from events.errors import ConfigurationError, StaleRowError, TooLargeError
from events.failpoints import armed
from events.message import Command, Failed, Refused, Succeeded
from handlers.tables import retry
from tests.support.engines import (
    DATABASE_PAUSE,
    SMALL,
    Hold,
    World,
    actions,
    envelope_of,
    failing,
    reply,
    wanted,
)
from tests.support.flows import (
    PATIENCE,
    FakeDelivery,
    count_rows,
    until,
)
from tests.support.sagas import (
    BookFlight,
    BookHotel,
    CancelHotel,
    FlightBooked,
    FlightFull,
    NewTrip,
    PayTrip,
    Trip,
    TripWanted,
)


def is_long(self: Any) -> bool:
    return bool(self.trip.startswith("long"))


class Stubborn(Saga, deadline=1000):
    """A way without return, and a way back that is asked for again."""

    trip: str

    @starts_on(TripWanted)
    @classmethod
    def wanted(cls, event: TripWanted) -> Self:
        return cls(trip=event.trip)

    @step(timeout=10)
    def hotel(self) -> BookHotel:
        return BookHotel(trip=self.trip)

    @hotel.compensation(retry=Backoff(2, first=5))
    def cancel_hotel(self) -> CancelHotel:
        return CancelHotel(trip=self.trip)

    @step(timeout=10, pivot=True, recovery=Backoff(2, first=20))
    def payment(self) -> PayTrip:
        return PayTrip(trip=self.trip)

    flow = sequence(hotel, payment)


class Branching(Saga):
    """Steps side by side, and a choice."""

    trip: str

    @starts_on(TripWanted)
    @classmethod
    def wanted(cls, event: TripWanted) -> Self:
        return cls(trip=event.trip)

    @step
    def hotel(self) -> BookHotel:
        return BookHotel(trip=self.trip)

    @hotel.compensation
    def cancel_hotel(self) -> CancelHotel:
        return CancelHotel(trip=self.trip)

    @step
    def flight(self) -> BookFlight:
        return BookFlight(trip=self.trip)

    @step
    def payment(self) -> PayTrip:
        return PayTrip(trip=self.trip)

    flow = sequence(parallel(hotel, flight), when(is_long, payment))


class Measured(Trip, name="measured"):
    amount: float = 6.02214076e23


class Blob(Command):
    """Only bytes that are UTF-8 can be written as JSON."""

    data: bytes


class Odd(Saga):
    """A saga whose key says which of its commands cannot be sent."""

    trip: str

    @starts_on(TripWanted)
    @classmethod
    def wanted(cls, event: TripWanted) -> Self:
        return cls(trip=event.trip)

    @step(timeout=10)
    def hotel(self) -> Command:
        return Blob(data=b"\xff") if self.trip == "bad first" else BookHotel(trip=self.trip)

    @hotel.compensation
    def cancel_hotel(self) -> Command:
        if self.trip == "bad undo":
            return Blob(data=b"\xff")
        return CancelHotel(trip="x" * SMALL.body if self.trip == "large undo" else self.trip)

    @step
    def flight(self) -> Blob:
        return Blob(data=b"\xff")

    flow = sequence(hotel, flight)


async def test_many_starts_and_replies_are_one_transaction(world: World) -> None:
    coordinator = await world.coordinator()
    commits: list[object] = []

    def note_if_it_commits(connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT" and "INSERT" in statement:
            commits.append(statement)

    event.listen(world.engine.sync_engine, "commit", commits.append)
    event.listen(world.engine.sync_engine, "before_cursor_execute", note_if_it_commits)
    await coordinator.take(*(wanted(f"a-{number}") for number in range(50)))
    assert len(commits) == 1

    hotels = [each.saga for each in await world.sent("book.hotel")]
    commits.clear()
    coordinator.give(*(wanted(f"b-{number}") for number in range(50)))
    coordinator.give(*(reply(hotel.saga_id, "hotel") for hotel in hotels if hotel))
    await coordinator.settled()
    assert len(commits) == 1
    assert len(await world.sent("book.flight")) == 50
    assert len(await world.sent("book.hotel")) == 100
    assert await coordinator.store.count_in_flight() == 100
    assert await count_rows(world.engine, saga_history) == 150


async def test_duplicate_starts_make_one_instance(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """In one message, in one batch, and in a later batch; redelivered with the same id, or sent anew."""
    coordinator = await world.coordinator()
    first = wanted()
    with caplog.at_level(logging.INFO, "coordinator"):
        coordinator.give(first, first, wanted("t-2"))
        coordinator.give(wanted())
        await coordinator.settled()
        await coordinator.take(first, wanted("t-3"), wanted())
    assert set(actions(caplog)) == {"saga.duplicate_start"}
    assert await world.history() == await world.history("t-2") == await world.history("t-3") == ["started"]
    assert len(await world.sent("book.hotel")) == len(await world.sent()) == 3
    assert await count_rows(world.engine, saga_instance) == 3
    assert await world.dead() == {}


async def test_several_replies_to_one_saga_in_one_batch_are_taken_in_order(world: World) -> None:
    coordinator = await world.coordinator()
    await coordinator.take(wanted())
    saga = (await world.instance()).id
    hotel, flight = reply(saga, "hotel"), reply(saga, "flight", FlightBooked(ticket="T1"))
    coordinator.give(hotel, hotel, flight)
    coordinator.give(reply(saga, "payment"))
    await coordinator.settled()
    done = await world.instance()
    assert (done.status, done.state["ticket"], done.due_at) == (Status.COMPLETED, "T1", None)
    assert await world.history() == ["started", "reply", "late_reply", "reply", "reply"]
    assert {each.type for each in await world.sent()} == {"book.hotel", "book.flight", "pay.trip", "trip.ready"}


@pytest.mark.parametrize(("trip", "payments", "status"), [("long", 1, "running"), ("short", 0, "completed")])
async def test_steps_side_by_side_are_sent_at_once_and_their_replies_taken_in_one_batch(
    world: World, trip: str, payments: int, status: str
) -> None:
    coordinator = await world.coordinator(Branching)
    await coordinator.take(wanted(trip))
    assert {each.type for each in await world.sent()} == {"book.hotel", "book.flight"}
    saga_id = (await world.instance(trip)).id
    await coordinator.take(reply(saga_id, "hotel"), reply(saga_id, "flight"))
    assert len(await world.sent("pay.trip")) == payments
    assert (await world.instance(trip)).status == status
    assert await world.history(trip) == ["started", "reply", "reply"]


async def test_what_cannot_be_taken_is_kept_byte_for_byte_while_the_rest_goes_on(world: World) -> None:
    coordinator = await world.coordinator()
    await coordinator.take(wanted())
    saga = (await world.instance()).id
    newer = wanted("newer")
    newer.version = 2
    odd = newer.encode().replace(b'"specversion":"1.0"', b'"specversion" : "0.3" ')
    rejected: dict[bytes, str] = {
        reply(uuid4(), "hotel").encode(): "unknown_saga",
        reply(saga, "hotel", result=None).encode(): "invalid",
        reply(saga, "flight", FlightFull(trip="t-1", reason="full")).encode(): "invalid",
        envelope_of(FlightFull(trip="t-1", reason="no start")).encode(): "unknown_saga",
        envelope_of(Refused(reason="nobody asked")).encode(): "unknown_saga",
        envelope_of(Succeeded()).encode(): "unknown_type",
        newer.encode(): "newer_version",
        wanted("x").encode().replace(b'"trip":"x"', b'"trip": 7 '): "invalid",
        wanted("broken", "wanted").encode(): "failed",
        wanted("").encode(): "failed",
        odd: "malformed",
        b'{"no" : "event", "text": "\xc3\xa9"}': "malformed",
    }
    coordinator.give(wanted("t-2"), *rejected, reply(saga, "hotel"))
    whole = FakeDelivery(b'\xff[{"cut', headers={"x-odd": b"\0\xff", "number": 7})
    coordinator.bus.put("coordinator.tests.replies", whole)
    await coordinator.settled()

    assert await world.dead() == {**rejected, whole.body: "malformed"}
    assert await world.history() == ["started", "reply"]
    assert await world.history("t-2") == ["started"]
    assert await count_rows(world.engine, saga_instance) == 2
    assert sorted(each.type for each in await world.sent()) == ["book.flight", "book.hotel", "book.hotel"]


async def test_one_message_whose_consequences_cannot_be_stored_does_not_spoil_its_batch(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The outbox refuses the command: the batch is split, and the culprit is buried."""
    coordinator = await world.coordinator()
    culprit = wanted("x" * SMALL.body)
    one = coordinator.give(wanted(), culprit, wanted("t-2"))
    two = coordinator.give(wanted("t-3"))
    await coordinator.settled()
    assert actions(caplog) == ["engine.batch_split", "engine.rejected"]
    assert await world.dead() == {culprit.encode(): "too_large"}
    assert await count_rows(world.engine, saga_instance) == len(await world.sent("book.hotel")) == 3
    assert (one.acks, two.acks) == (1, 1)


# Commits


@pytest.mark.parametrize("error", [OSError("the connection is lost"), TimeoutError(), StaleRowError()], ids=repr)
async def test_a_batch_is_tried_again_until_the_database_takes_it(
    world: World, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = await world.coordinator()
    tries = 1 + (isinstance(error, StaleRowError) and world.engine.dialect.name == "postgresql")  # the second locks
    with armed("engine.before_commit", failing(*[error] * 2 * tries)):
        delivery = coordinator.give(wanted(), wanted("t-2"))
        for _ in range(2):
            await world.clock.asleep(DATABASE_PAUSE)
            assert delivery.acks == 0
            assert await world.sent() == []
            world.clock.advance(DATABASE_PAUSE)
        await coordinator.settled()
    assert actions(caplog) == ["engine.batch_retried"] * 2
    assert await world.history() == await world.history("t-2") == ["started"]
    assert len(await world.sent()) == 2
    assert await world.dead() == {}


async def test_a_message_that_fails_for_an_unknown_reason_is_tried_again_before_it_is_given_up_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A reply that is given up on costs its saga a deadline."""
    coordinator = await world.coordinator()
    with armed("engine.before_commit", failing(*[RuntimeError("who knows")] * 2)):
        coordinator.give(wanted())
        for _ in range(2):
            await world.clock.pass_sleep(DATABASE_PAUSE)
        await coordinator.settled()
    assert actions(caplog) == ["engine.message_retried"] * 2
    assert await world.history() == ["started"]
    assert await world.dead() == {}


@pytest.mark.parametrize("committed", [False, True], ids=["before the commit", "after the commit"])
async def test_nothing_is_acknowledged_before_its_commit_and_a_crash_costs_and_repeats_nothing(
    world: World, committed: bool
) -> None:
    coordinator = await world.coordinator()
    await coordinator.take(wanted("old"))
    saga = (await world.instance("old")).id
    messages: list[Envelope | bytes] = [wanted(), reply(saga, "hotel"), b"{}"]
    crash = Hold()
    with armed("engine.after_commit" if committed else "engine.before_commit", crash):
        delivery = coordinator.give(*messages)
        await crash.reached()
        assert delivery.acks == 0
        await coordinator.engine.stop()
    assert delivery.acks == 0
    assert await count_rows(world.engine, saga_instance) == (2 if committed else 1)
    assert len(await world.sent("book.flight")) == len(await world.dead()) == committed

    successor = await world.coordinator()
    successor.give(*messages[:2], redelivered=True)
    await successor.settled()
    assert await world.history() == ["started"]
    assert await world.history("old") == (["started", "reply", "late_reply"] if committed else ["started", "reply"])
    assert len(await world.sent("book.flight")) == 1
    assert len(await world.sent("book.hotel")) == 2


async def test_i10_two_coordinators_that_get_the_same_replies_take_each_once(shared: World) -> None:
    """One decides, and before it can write the other one has written: it decides again, and its replies come late."""
    one, two = await shared.coordinator(apart=True), await shared.coordinator(apart=True)
    keys = [f"t-{number}" for number in range(20)]
    await one.take(*(wanted(key) for key in keys))
    replies = [reply((await shared.instance(key)).id, "hotel") for key in keys]

    async def one_is_done() -> bool:
        return any(all(delivery.acks for delivery in each.bus.deliveries) for each in (one, two))

    first_commit = iter([True])

    async def wait_for_the_other() -> None:
        if next(first_commit, False):
            await until(one_is_done)

    with armed("engine.before_commit", wait_for_the_other):
        one.give(*replies)
        two.give(*reversed(replies), wanted("t-0"))
        await one.settled()
        await two.settled()
    for key in keys:
        assert await shared.history(key) == ["started", "reply", "late_reply"]
    assert len(await shared.sent("book.flight")) == len(keys)
    assert await count_rows(shared.engine, saga_instance) == len(keys)


# Deadlines


async def test_i12_a_deadline_is_acted_on_once_and_not_before_it_is_due(world: World) -> None:
    coordinator = await world.coordinator()
    await coordinator.take(wanted(), wanted("t-2"))
    saga = (await world.instance("t-2")).id
    world.clock.advance(5)
    await coordinator.take(reply(saga, "hotel"))  # its next deadline is 20 s away
    world.clock.advance(4.999)
    assert await coordinator.engine.deadlines.fire() == 0
    world.clock.advance(0.001)
    assert await coordinator.engine.deadlines.fire() == 1
    assert await coordinator.engine.deadlines.fire() == 0
    assert await world.history() == ["started", "deadline"]
    assert await world.history("t-2") == ["started", "reply"]
    assert (await world.instance()).steps["hotel"].status is StepStatus.UNDOING
    [undo] = await world.sent("cancel.hotel")
    identity = (await world.instance()).id
    assert undo.correlation_id == str(identity)
    assert undo.causation_id == str(derive_id(identity, "hotel", "do", 1)), "the command that was not answered"


async def test_what_has_failed_is_asked_for_anew_when_its_time_has_come(world: World) -> None:
    """Each attempt is a command of its own, caused by the one before it."""
    coordinator = await world.coordinator(Stubborn)
    await coordinator.take(wanted())
    saga_id = (await world.instance()).id
    await coordinator.take(reply(saga_id, "hotel"))
    await coordinator.take(reply(saga_id, "payment", Failed(code="failed", reason="", attempts=1), Result.FAILED))
    assert await coordinator.engine.deadlines.fire() == 0
    world.clock.advance(20)
    assert await coordinator.engine.deadlines.fire() == 1
    first, second = await world.sent("pay.trip")
    assert second.causation_id == first.id != second.id
    declined = SagaLink(saga_id, "payment", Direction.DO, 2, Result.DECLINED)
    await coordinator.take(envelope_of(Refused(reason="no money"), declined))
    failed = SagaLink(saga_id, "hotel", Direction.UNDO, 1, Result.FAILED)
    await coordinator.take(envelope_of(Failed(code="failed", reason="", attempts=1), failed))
    world.clock.advance(4)
    assert await coordinator.engine.deadlines.fire() == 0
    world.clock.advance(1)
    assert await coordinator.engine.deadlines.fire() == 1
    first, second = await world.sent("cancel.hotel")
    assert second.causation_id == first.id != second.id
    assert (await world.instance()).status == "compensating"


async def test_f50_a_reply_that_answers_nothing_outstanding_moves_no_saga(world: World) -> None:
    """Forged, replayed, or for somebody else: it is noted or kept, and has no effect. There are no signatures."""
    coordinator = await world.coordinator(Stubborn)
    await coordinator.take(wanted())
    before, sent = await world.instance(), len(await world.sent())
    forged = [
        envelope_of(Succeeded(), SagaLink(uuid4(), "hotel", Direction.DO, 1, Result.SUCCEEDED)),
        envelope_of(Succeeded(), SagaLink(before.id, "hotel", Direction.DO, 2, Result.SUCCEEDED)),
        envelope_of(Succeeded(), SagaLink(before.id, "hotel", Direction.UNDO, 1, Result.SUCCEEDED)),
        envelope_of(Succeeded(), SagaLink(before.id, "payment", Direction.DO, 1, Result.SUCCEEDED)),
        envelope_of(Succeeded(), SagaLink(before.id, "no such step", Direction.DO, 1, Result.SUCCEEDED)),
    ]
    await coordinator.take(*forged)
    after = await world.instance()
    assert (after.status, after.steps, after.state, after.due_at) == (
        before.status,
        before.steps,
        before.state,
        before.due_at,
    )
    assert len(await world.sent()) == sent
    assert list((await world.dead()).values()) == ["unknown_saga"]
    assert await world.history() == ["started", *["late_reply"] * 4]


async def test_the_history_keeps_what_was_decided_on(world: World) -> None:
    """Messages as they came, and who said them; what an operator said; nothing of a deadline, which only has a time."""
    coordinator = await world.coordinator(Stubborn)
    await coordinator.take(wanted())
    instance = await world.instance()
    world.clock.advance(11)
    await coordinator.engine.deadlines.fire()
    assert (await world.instance()).status == "compensating"
    until_then = coordinator.store.clock.now() + timedelta(days=1)
    operator = Operator(coordinator.engine, coordinator.store, coordinator.clock)
    await operator.act("t-1", Verb.MOVE_DEADLINE, by="ada", why="a holiday", step="hotel", until=until_then, revision=2)
    full = FlightFull(trip="é 😀", reason="full")
    await coordinator.take(reply(instance.id, "hotel", full, Result.FAILED, Direction.UNDO))
    assert await world.history() == ["started", "deadline", "move_deadline", "reply"]
    started, deadline, acted, replied = await coordinator.store.history(instance.id)
    assert started.input == {
        "source": "/tests",
        "type": "trip.wanted",
        "version": 1,
        "data": from_json(wanted().data),
    }
    assert deadline.input is None
    assert datetime.fromisoformat(acted.input["until"]) == until_then
    assert acted.input["revision"] == 2
    assert replied.input["type"] == "flight.full"
    assert replied.input["data"]["trip"] == "é 😀"


async def test_an_operator_steps_in_and_the_history_says_who_and_why(world: World) -> None:
    coordinator = await world.coordinator(Stubborn)
    operator = Operator(coordinator.engine, coordinator.store, coordinator.clock)
    await coordinator.take(wanted())
    instance = await operator.act("t-1", Verb.CANCEL, by="ada", why="the customer called")
    assert instance.status == "compensating"
    assert instance == await world.instance()
    assert await world.history() == ["started", "cancel"]
    row = (await coordinator.store.history(instance.id))[-1]
    assert (row.actor, row.why) == ("ada", "the customer called")
    await operator.act(instance.id, Verb.RETRY, by="ada", why="again", step="hotel")
    first, again = await world.sent("book.hotel")
    assert first.id == again.id
    for reference, why, said in (("t-9", "why", "there is no saga"), ("t-1", " ", "say who does this, and why")):
        with pytest.raises(ConfigurationError, match=said):
            await operator.act(reference, Verb.CANCEL, by="ada", why=why)
    with pytest.raises(NotPossibleError):
        await operator.act("t-1", Verb.CANCEL, by="ada", why="once more")
    assert len(await world.history()) == 3


async def test_an_operator_says_how_a_step_ended_and_the_saga_goes_on_from_there(world: World) -> None:
    coordinator = await world.coordinator()
    operator = Operator(coordinator.engine, coordinator.store, coordinator.clock)
    await coordinator.take(wanted())
    await coordinator.take(reply((await world.instance()).id, "hotel"))
    about: dict[str, Any] = {"by": "ada", "why": "the airline says so", "step": "flight"}
    with pytest.raises(NotPossibleError, match="ticket: Field required"):
        await operator.act("t-1", Verb.RESOLVE, resolution=Resolution.SUCCEEDED, **about)
    given: dict[str, Any] = {"resolution": Resolution.SUCCEEDED, "data": {"ticket": "T7"}}
    instance = await operator.act("t-1", Verb.RESOLVE, **about, **given)
    assert (instance.state["ticket"], instance) == ("T7", await world.instance())
    assert len(await world.sent("pay.trip")) == 1
    row = (await coordinator.store.history(instance.id))[-1]
    assert (row.kind, row.step, row.result, row.why) == ("resolve", "flight", "succeeded", "the airline says so")


async def test_a_cancel_that_races_the_last_reply_comes_first_or_is_refused(world: World) -> None:
    coordinator = await world.coordinator(NewTrip)
    operator = Operator(coordinator.engine, coordinator.store, coordinator.clock)
    for trip in map(str, range(10)):
        await coordinator.take(wanted(trip))
        last = coordinator.take(reply((await world.instance(trip)).id, "hotel"))
        act = operator.act(trip, Verb.CANCEL, by="ada", why="stop it")
        cancelled, _ = await asyncio.gather(act, last, return_exceptions=True)
        history, status = await world.history(trip), (await world.instance(trip)).status
        if isinstance(cancelled, Instance):
            assert (history, status) == (["started", "cancel", "reply"], Status.COMPENSATED)
        else:
            assert isinstance(cancelled, NotPossibleError)
            assert (history, status) == (["started", "reply"], Status.COMPLETED)


async def test_the_deadline_of_a_saga_is_moved_for_good(world: World) -> None:
    coordinator = await world.coordinator(Stubborn)
    operator = Operator(coordinator.engine, coordinator.store, coordinator.clock)
    await coordinator.take(wanted())
    until = coordinator.store.clock.now() + timedelta(seconds=5)
    moved = await operator.act("t-1", Verb.MOVE_DEADLINE, by="ada", why="it is urgent", until=until)
    assert (moved.deadline, moved.due_at, moved) == (until, until, await world.instance())
    world.clock.advance(5)
    assert await coordinator.engine.deadlines.fire() == 1
    assert (await world.instance()).status is Status.COMPENSATING


async def test_of_two_operators_at_once_the_second_is_told_to_look_again(world: World) -> None:
    coordinator = await world.coordinator(Stubborn)
    operator = Operator(coordinator.engine, coordinator.store, coordinator.clock)
    await coordinator.take(wanted())
    seen = (await world.instance()).revision
    results = await asyncio.gather(
        operator.act("t-1", Verb.CANCEL, by="ada", why="stop it", revision=seen),
        operator.act("t-1", Verb.RETRY, by="bob", why="ask again", step="hotel", revision=seen),
        return_exceptions=True,
    )
    assert sorted(type(result).__name__ for result in results) == ["Instance", "NotPossibleError"]
    assert len(await world.history()) == 2


async def test_i12_two_coordinators_that_look_at_once_act_on_a_deadline_once(shared: World) -> None:
    one, two = await shared.coordinator(apart=True), await shared.coordinator(apart=True)
    await one.take(*(wanted(f"t-{number}") for number in range(10)))
    shared.clock.advance(10)
    hold = Hold()
    with armed("engine.timers_claimed", hold):
        firing = asyncio.create_task(one.engine.deadlines.fire())
        await hold.reached()
        async with asyncio.timeout(PATIENCE):
            assert await two.engine.deadlines.fire() == 0
        hold.release()
        assert await firing == 10
    assert await two.engine.deadlines.fire() == 0
    assert await shared.history("t-0") == ["started", "deadline"]
    assert len(await shared.sent("cancel.hotel")) == 10


async def test_the_coordinator_looks_for_deadlines_itself_also_after_the_database_was_away(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = await world.coordinator(timer_every=10)
    await coordinator.take(wanted())
    with armed("engine.timers_claimed", failing(OSError("away"), StaleRowError())):
        for failures in (1, 2, 2):
            assert await world.sent("cancel.hotel") == []
            await world.clock.pass_sleep(10)
            await world.clock.asleep(10)
            assert actions(caplog) == ["engine.database_away"] * failures
    assert len(await world.sent("cancel.hotel")) == 1
    assert await world.history() == ["started", "deadline"]


async def test_an_instance_whose_state_cannot_be_read_any_more_needs_attention(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = await world.coordinator()
    await coordinator.take(wanted(), wanted("t-2"))
    await world.set_state("t-1", {"trip": "t-1", "of_another_release": True})
    late = reply((await world.instance()).id, "hotel")
    await coordinator.take(late)
    assert await world.dead() == {late.encode(): "failed"}

    caplog.clear()
    world.clock.advance(10)
    assert await coordinator.engine.deadlines.fire() == 2
    stuck = await world.instance()
    assert (stuck.status, stuck.due_at) == (Status.NEEDS_ATTENTION, None)
    assert (stuck.reason or "").startswith("trip cannot be decided on")
    assert actions(caplog, logging.ERROR) == ["saga.undecidable", "saga.needs_attention"]
    assert await world.history() == ["started", "given_up"]
    assert await world.history("t-2") == ["started", "deadline"]
    world.clock.advance(1000)
    assert await coordinator.engine.deadlines.fire() == 1


async def test_a_saga_that_needs_attention_from_its_start_calls_a_person(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = await world.coordinator()
    start = wanted("t-1", "hotel", "off")
    await coordinator.take(start)
    assert (await world.instance()).status is Status.NEEDS_ATTENTION
    assert actions(caplog, logging.ERROR) == ["saga.needs_attention"]
    await coordinator.take(start)
    assert actions(caplog, logging.ERROR) == ["saga.needs_attention"], "this one is a duplicate"


async def is_completed(world: World, key: str = "t-1") -> bool:
    return (await world.instance(key)).status is Status.COMPLETED


async def test_the_deadline_of_a_saga_of_an_unknown_version_is_left_to_those_who_know_it(world: World) -> None:
    newer = await world.coordinator(NewTrip, Trip)
    await newer.take(wanted())
    assert (await world.instance()).version == 2, "starts go to the newest version"
    await newer.engine.stop()
    older = await world.coordinator(Trip)
    world.clock.advance(1000)
    assert await older.engine.deadlines.fire() == 0
    assert await world.history() == ["started"]


async def test_replies_to_a_saga_of_an_unknown_version_are_held_for_those_who_know_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    newer = await world.coordinator(NewTrip, Trip)
    await newer.take(wanted())
    before = await world.instance()
    await newer.engine.stop()

    older, both = await world.coordinator(Trip), await world.coordinator(Trip, NewTrip)
    answer = reply(before.id, "hotel")
    await older.take(answer, wanted("t-2"))
    await older.take(answer)  # it comes a second time
    assert actions(caplog, logging.WARNING) == ["saga.unknown_version"], "once is enough"
    assert await world.dead() == {}
    assert await count_rows(world.engine, retry) == 1
    assert await world.instance() == before
    assert (await world.instance("t-2")).version == 1

    await both.take(reply((await world.instance("t-2")).id, "hotel"))
    await world.clock.asleep(1.0)
    world.clock.advance(31)  # it asks the database for the time, too
    await until(lambda: is_completed(world))
    assert len(await world.sent("book.flight")) == 1
    assert await world.history() == ["started", "reply"]
    assert await count_rows(world.engine, retry) == 0


async def test_a_retired_version_finishes_its_instances_and_starts_none(world: World) -> None:
    newer = await world.coordinator(NewTrip, Trip)
    await newer.take(wanted())
    await newer.engine.stop()
    back = await world.coordinator(Trip, retired=[NewTrip])
    await back.take(reply((await world.instance()).id, "hotel"), wanted("t-2"))
    assert [(await world.instance(key)).version for key in ("t-1", "t-2")] == [2, 1]
    assert await is_completed(world)


# What is sent and said


async def test_i15_what_is_sent_names_its_saga_and_its_cause(world: World) -> None:
    coordinator = await world.coordinator()
    start = wanted()
    await coordinator.take(start)
    saga = (await world.instance()).id
    causes = {"book.hotel": start.id}
    for step_name, outcome, caused in (
        ("hotel", Succeeded(), "book.flight"),
        ("flight", FlightBooked(ticket="T1"), "pay.trip"),
        ("payment", Succeeded(), "trip.ready"),
    ):
        answer = reply(saga, step_name, outcome)
        causes[caused] = answer.id
        await coordinator.take(answer)

    sent = {each.type: each for each in await world.sent()}
    assert {name: each.causation_id for name, each in sent.items()} == causes
    assert {each.correlation_id for each in sent.values()} == {str(saga)}
    assert {each.source for each in sent.values()} == {"/tests/coordinator"}
    assert sent.pop("trip.ready").saga is None
    for name, step_name in (("book.hotel", "hotel"), ("book.flight", "flight"), ("pay.trip", "payment")):
        assert sent[name].saga == SagaLink(saga, step_name, Direction.DO, 1)
        assert sent[name].reply_to == "coordinator.tests"


async def test_a_saga_that_needs_attention_is_an_error_in_the_log_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator = await world.coordinator()
    await coordinator.take(wanted())
    saga = (await world.instance()).id
    out_of_order = Failed(code="failed", reason="out of order", attempts=5)
    await coordinator.take(
        reply(saga, "hotel"),
        reply(saga, "flight", FlightFull(trip="t-1", reason="sold out"), Result.DECLINED),
        reply(saga, "hotel", out_of_order, Result.FAILED, Direction.UNDO),
        reply(saga, "payment"),
    )
    assert (await world.instance()).status is Status.NEEDS_ATTENTION
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert "flight declined: sold out" in record.getMessage()
    assert {"action": "saga.needs_attention", "saga": "trip", "saga_id": str(saga)}.items() <= vars(record).items()


# Commands that cannot be sent


@pytest.mark.parametrize("key", ["bad first", "bad second"])
async def test_a_message_is_either_taken_or_a_dead_letter_but_never_half_of_both(world: World, key: str) -> None:
    coordinator = await world.coordinator(Odd)
    await coordinator.take(wanted(key))
    if key == "bad second":
        await coordinator.take(reply((await world.instance(key)).id, "hotel"))
    transitions = await count_rows(world.engine, saga_history) - (key == "bad second")
    assert transitions + len(await world.dead()) == 1


@pytest.mark.parametrize("key", ["large undo", "bad undo"])
async def test_one_saga_whose_deadline_cannot_be_stored_does_not_hold_up_all_others(world: World, key: str) -> None:
    coordinator = await world.coordinator(Odd)
    await coordinator.take(wanted(key), wanted("t-2"))
    world.clock.advance(10)
    for _ in range(2):
        with suppress(TooLargeError, DBAPIError):
            await coordinator.engine.deadlines.fire()
    assert await world.history("t-2") == ["started", "deadline"]


async def test_a_large_float_in_the_state_does_not_turn_a_saga_back(shared: World) -> None:
    coordinator = await shared.coordinator(Measured)
    await coordinator.take(wanted())
    await coordinator.take(reply((await shared.instance()).id, "hotel"))
    assert (await shared.instance()).reason is None
    assert len(await shared.sent("book.flight")) == 1
