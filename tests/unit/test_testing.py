"""The words in which users test their sagas."""

import pytest

from coordinator.instance import StepStatus
from coordinator.testing import SagaRun
from events.envelope import Direction, Result
from tests.support.sagas import (
    BookFlight,
    BookHotel,
    CancelFlight,
    CancelHotel,
    FlightBooked,
    FlightFull,
    PayTrip,
    RefundTrip,
    Trip,
    TripOff,
    TripReady,
    TripWanted,
)

WANTED = TripWanted(trip="t-1")


def test_a_saga_that_completes_reads_as_a_story() -> None:
    run = SagaRun(Trip, WANTED)
    assert run.sent == [BookHotel(trip="t-1")]
    run.succeeds()
    assert run.sent == [BookFlight(trip="t-1")]
    run.succeeds(FlightBooked(ticket="LH-1"))
    assert isinstance(run.saga, Trip)
    assert run.saga.ticket == "LH-1"
    assert run.succeeds(step="payment").status == "completed"
    assert run.published == [TripReady(trip="t-1", ticket="LH-1")]
    assert run.sent == []


def test_a_saga_that_is_undone_reads_as_a_story() -> None:
    run = SagaRun(Trip, WANTED).succeeds().declines(FlightFull(trip="t-1", reason="full"))
    assert (run.status, run.sent) == ("compensating", [CancelHotel(trip="t-1")])
    run.succeeds()
    assert (run.status, run.reason) == ("compensated", "flight declined: full")
    assert run.published == [TripOff(trip="t-1", reason="flight declined: full")]


def test_a_no_may_be_said_in_words() -> None:
    assert SagaRun(Trip, WANTED).declines("no rooms").reason == "hotel declined: no rooms"


def test_a_technical_failure_is_undone_and_a_compensation_that_fails_asks_for_a_person() -> None:
    run = SagaRun(Trip, WANTED).succeeds().succeeds(FlightBooked(ticket="LH-1")).fails("timed out")
    assert run.sent == [RefundTrip(trip="t-1")]
    assert run.reason == "payment failed: failed: timed out"
    run.fails().succeeds().succeeds()
    assert run.status == "needs_attention"


def test_time_passes_only_when_told_to() -> None:
    run = SagaRun(Trip, WANTED).succeeds()
    run.passes(19)
    assert run.sent == [BookFlight(trip="t-1")]
    assert run.instance.steps["flight"].sends == 1
    run.passes(1)
    assert run.instance.steps["flight"].sends == 2
    run.gives_no_answer().gives_no_answer()
    assert run.sent == [CancelFlight(trip="t-1", ticket=None)]


def test_a_reply_that_nobody_waits_for_can_be_delivered() -> None:
    run = SagaRun(Trip, WANTED).succeeds().replies("hotel", Direction.DO, Result.SUCCEEDED)
    assert run.last.entry.kind == "late_reply"
    assert run.instance.steps["flight"].status is StepStatus.RUNNING


def test_an_answer_to_nothing_says_what_the_saga_waits_for() -> None:
    run = SagaRun(Trip, WANTED).succeeds()
    with pytest.raises(AssertionError, match="the saga is running and waits for flight, not payment"):
        run.succeeds(step="payment")
    run.declines("full").succeeds()
    for act in (run.succeeds, run.fails, run.gives_no_answer):
        with pytest.raises(AssertionError, match="the saga is compensated and waits for nothing"):
            act()
    run = SagaRun(Trip, WANTED).succeeds().succeeds()
    assert run.sent == [PayTrip(trip="t-1")]
