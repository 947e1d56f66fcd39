"""What follows from an input, decided without a clock, a database or a bus."""
# A run moves on between two assertions about it, which mypy does not see.
# mypy: disable-error-code="comparison-overlap"

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from coordinator.decide import decide, describe, give_up
from coordinator.decision import Elapsed, Replied, Started
from coordinator.definition import Saga
from coordinator.flow import sequence
from coordinator.instance import Instance, Status, StepState, StepStatus
from coordinator.steps import completed, starts_on, step
from events.derive import derive_id
from events.envelope import Direction, Result
from events.message import Event, Failed, Refused, Succeeded
from tests.support.sagas import (
    SAGA_ID,
    START,
    BookFlight,
    BookHotel,
    CancelFlight,
    CancelHotel,
    FlightBooked,
    FlightFull,
    PayTrip,
    RefundTrip,
    Run,
    Trip,
    TripOff,
    TripReady,
    TripWanted,
)

DO, UNDO = Direction.DO, Direction.UNDO
SUCCEEDED, DECLINED, FAILED = Result.SUCCEEDED, Result.DECLINED, Result.FAILED
TICKET = FlightBooked(ticket="LH-1")
BY_TEN = START + timedelta(seconds=10)


def at_flight(*faults: str) -> Run:
    run = Run(*faults)
    run.done("hotel")
    return run


def at_payment(*faults: str) -> Run:
    run = at_flight(*faults)
    run.done("flight", outcome=TICKET)
    return run


def given_up_on_flight(*faults: str) -> Run:
    """The flight gave no answer; its compensation is outstanding."""
    run = at_flight(*faults)
    for _ in range(3):
        run.expire()
    return run


def steps(run: Run) -> dict[str, StepStatus]:
    return {name: at.status for name, at in run.instance.steps.items()}


def check(run: Run) -> None:
    """What holds of every run: the revisions have no gap, and nothing in flight is without a deadline."""
    for number, decision in enumerate(run.decisions, 1):
        assert decision.instance.revision == number
        assert decision.entry.status is decision.instance.status
        assert (decision.instance.due_at is not None) is decision.instance.status.in_flight
        due = [at.due_at for at in decision.instance.steps.values() if at.due_at is not None]
        assert decision.instance.due_at == min(due, default=None)


# The way forward


def test_a_start_makes_an_instance_and_asks_for_the_first_step() -> None:
    run = Run()
    assert run.instance == Instance(
        id=SAGA_ID,
        saga="trip",
        version=1,
        key="t-1",
        status=Status.RUNNING,
        state={"trip": "t-1", "faults": [], "ticket": None, "refusal": None},
        steps={"hotel": StepState(StepStatus.RUNNING, sends=1, due_at=BY_TEN, command="book.hotel")},
        revision=1,
        due_at=START + timedelta(seconds=10),
        traceparent="00-trace-01",
        created_at=START,
        updated_at=START,
    )
    assert run.request.command == BookHotel(trip="t-1")


def test_each_success_asks_for_the_next_step_and_the_last_one_completes_the_saga() -> None:
    run = at_flight()
    assert run.request.command == BookFlight(trip="t-1")
    run.done("flight", outcome=TICKET)
    assert run.request.command == PayTrip(trip="t-1")
    run.done("payment")
    assert run.instance.status is Status.COMPLETED
    assert run.asked == [("hotel", DO, 1), ("flight", DO, 1), ("payment", DO, 1)]
    assert run.announced == [TripReady(trip="t-1", ticket="LH-1")]
    check(run)


def test_a_saga_may_end_in_silence() -> None:
    class Quiet(Saga):
        trip: str

        @starts_on(TripWanted)
        def wanted(cls, event: TripWanted) -> "Quiet":
            return Quiet(trip=event.trip)

        @step
        def hotel(self) -> BookHotel:
            return BookHotel(trip=self.trip)

        @completed
        def nothing(self) -> None:
            """Nobody needs to know."""

        flow = sequence(hotel)

    run = Run(saga=Quiet)
    run.done("hotel")
    assert (run.instance.status, run.announced) == (Status.COMPLETED, [])
    run = Run(saga=Quiet)
    run.done("hotel", DECLINED)
    assert (run.instance.status, run.announced) == (Status.COMPENSATED, [])
    check(run)


# Turning back


def test_a_compensation_names_the_command_that_it_undoes() -> None:
    run = at_flight()
    command = run.request
    assert (command.undoes, command.undoes_type) == (None, None)
    run.done("flight", FAILED)
    assert (run.request.undoes, run.request.undoes_type) == (command.id, "book.flight")


def test_a_declined_first_step_leaves_nothing_to_undo() -> None:
    run = Run()
    run.done("hotel", DECLINED)
    assert (run.instance.status, run.instance.reason) == (Status.COMPENSATED, "hotel declined: hotel says no")
    assert run.asked == [("hotel", DO, 1)]
    assert run.announced == [TripOff(trip="t-1", reason="hotel declined: hotel says no")]
    check(run)


def test_a_declined_second_step_undoes_the_first_only() -> None:
    run = at_flight()
    run.done("flight", DECLINED, FlightFull(trip="t-1", reason="full"))
    assert run.request.command == CancelHotel(trip="t-1")
    assert run.instance.status is Status.COMPENSATING
    run.undone("hotel")
    assert steps(run) == {"hotel": StepStatus.UNDONE, "flight": StepStatus.DECLINED}
    assert run.instance.status is Status.COMPENSATED
    assert run.instance.state["refusal"] == "full"
    check(run)


def test_a_declined_last_step_undoes_the_others_in_reverse_one_after_the_other() -> None:
    run = at_payment()
    run.done("payment", DECLINED)
    assert run.request.command == CancelFlight(trip="t-1", ticket="LH-1")
    run.undone("flight")
    assert run.request.command == CancelHotel(trip="t-1")
    run.undone("hotel")
    assert run.asked[3:] == [("flight", UNDO, 1), ("hotel", UNDO, 1)]
    assert run.announced == [TripOff(trip="t-1", reason="payment declined: payment says no")]
    check(run)


def test_a_failed_step_may_have_happened_and_is_undone_too() -> None:
    run = at_payment()
    run.done("payment", FAILED)
    assert run.instance.steps["payment"].status is StepStatus.UNDOING
    assert run.request.command == RefundTrip(trip="t-1")
    for name in ("payment", "flight", "hotel"):
        run.undone(name)
    assert run.instance.status is Status.COMPENSATED
    assert run.instance.reason == "payment failed: payment says no"
    check(run)


def test_a_step_without_compensation_is_passed_by_on_the_way_back() -> None:
    class Short(Saga):
        trip: str

        @starts_on(TripWanted)
        def wanted(cls, event: TripWanted) -> "Short":
            return Short(trip=event.trip)

        @step
        def hotel(self) -> BookHotel:
            return BookHotel(trip=self.trip)

        @hotel.compensation
        def cancel(self) -> CancelHotel:
            return CancelHotel(trip=self.trip)

        @step
        def flight(self) -> BookFlight:
            return BookFlight(trip=self.trip)

        @step
        def payment(self) -> PayTrip:
            return PayTrip(trip=self.trip)

        flow = sequence(hotel, flight, payment)

    run = Run(saga=Short)
    run.done("hotel")
    run.done("flight")
    run.done("payment", FAILED)
    assert run.request.command == CancelHotel(trip="t-1")
    run.undone("hotel")
    assert run.instance.status is Status.COMPENSATED
    assert steps(run) == {
        "hotel": StepStatus.UNDONE,
        "flight": StepStatus.SUCCEEDED,
        "payment": StepStatus.UNKNOWN,
    }
    run.done("payment")
    assert run.instance.status is Status.COMPENSATED
    assert (run.instance.steps["payment"].status, run.last.requests) == (StepStatus.SUCCEEDED, ())
    check(run)


# Deadlines


def test_a_deadline_sends_the_same_command_again_and_each_wait_is_twice_the_one_before() -> None:
    run = at_flight()
    first = run.request
    for sends, wait in ((2, 40), (3, 80)):
        run.expire()
        assert run.request == first
        assert run.instance.steps["flight"].sends == sends
        assert run.instance.due_at == run.now + timedelta(seconds=wait)
        assert run.instance.status is Status.RUNNING
    run.expire()
    assert run.instance.reason == "flight gave no answer in time"
    assert run.request.command == CancelFlight(trip="t-1")
    assert run.now == START + timedelta(seconds=20 + 40 + 80)
    check(run)


def test_a_step_without_resends_is_given_up_on_at_its_first_deadline() -> None:
    run = Run()
    run.expire()
    assert run.request.command == CancelHotel(trip="t-1")
    check(run)


def test_nothing_follows_from_time_that_has_passed_before_a_deadline() -> None:
    run = Run()
    assert run.pass_time(9.999) is None
    assert run.pass_time(0.001) is not None


def test_nothing_follows_from_time_once_the_answer_is_there() -> None:
    run = at_flight()
    assert run.pass_time(10) is None
    assert run.pass_time(10) is not None


def test_nothing_follows_from_time_when_the_saga_has_ended() -> None:
    run = at_payment()
    run.done("payment")
    assert run.instance.due_at is None
    assert run.pass_time(10**6) is None


def test_an_answer_to_a_command_that_was_sent_again_counts() -> None:
    run = at_flight()
    run.expire()
    run.done("flight", outcome=TICKET)
    assert run.request.command == PayTrip(trip="t-1")


def test_a_compensation_has_its_own_deadline_and_resends() -> None:
    run = at_flight()
    run.done("flight", DECLINED)
    first = run.request
    assert run.instance.due_at == run.now + timedelta(seconds=5)
    run.expire()
    assert run.request == first
    assert run.instance.due_at == run.now + timedelta(seconds=10)
    run.expire()
    assert run.instance.status is Status.NEEDS_ATTENTION
    assert steps(run)["hotel"] is StepStatus.UNDO_FAILED
    assert run.instance.reason == "flight declined: flight says no"  # the first reason is kept
    check(run)


def test_a_compensation_waits_as_long_as_its_step_unless_told_otherwise() -> None:
    run = given_up_on_flight()
    assert run.instance.due_at == run.now + timedelta(seconds=20)
    for _ in range(5):
        run.expire()
        assert run.instance.steps["flight"].status is StepStatus.UNDOING
    run.expire()
    assert run.instance.steps["flight"].status is StepStatus.UNDO_FAILED


def test_a_compensation_that_is_replayed_after_it_was_given_up_on_ends_the_saga() -> None:
    run = at_payment()
    run.done("payment", DECLINED)
    run.undone("flight", FAILED)
    run.undone("hotel", FAILED)
    assert run.instance.status is Status.NEEDS_ATTENTION
    run.undone("flight")
    assert run.last.entry.kind == "late_undo"
    assert steps(run)["flight"] is StepStatus.UNDONE
    assert run.instance.status is Status.NEEDS_ATTENTION, "the hotel is still booked"
    run.undone("flight")
    assert run.last.entry.kind == "late_reply"
    run.undone("hotel", FAILED)
    assert (run.last.entry.kind, steps(run)["hotel"]) == ("late_reply", StepStatus.UNDO_FAILED)
    run.undone("hotel")
    assert run.instance.status is Status.COMPENSATED
    assert run.announced == [TripOff(trip="t-1", reason="payment declined: payment says no")]
    check(run)


# Repeated, late and strange replies


def test_a_duplicate_reply_is_recorded_and_changes_nothing() -> None:
    run = at_flight()
    before = run.instance
    run.done("hotel")
    assert run.instance == replace(before, revision=3, updated_at=run.now)
    assert (run.last.entry.kind, run.last.entry.change, run.last.requests) == ("late_reply", {}, ())


def test_a_contradicting_reply_after_the_first_changes_nothing() -> None:
    run = at_flight()
    run.done("hotel", DECLINED)
    assert run.instance.status is Status.RUNNING
    assert run.last.entry.result is DECLINED
    run.done("flight", DECLINED)
    run.done("flight", outcome=TICKET)
    assert (run.last.entry.kind, run.instance.state["ticket"]) == ("late_reply", None)


def test_a_reply_for_another_attempt_changes_nothing() -> None:
    run = Run()
    run.replied("hotel", DO, SUCCEEDED, attempt=2)
    assert run.last.entry.kind == "late_reply"
    assert run.instance.steps["hotel"].status is StepStatus.RUNNING


@pytest.mark.parametrize("name", ["payment", "nonsense"])
def test_a_reply_for_a_step_that_was_not_begun_changes_nothing(name: str) -> None:
    run = Run()
    run.done(name)
    assert run.last.entry.kind == "late_reply"
    assert steps(run) == {"hotel": StepStatus.RUNNING}


def test_an_undo_reply_for_a_step_that_is_being_done_changes_nothing() -> None:
    run = Run()
    run.undone("hotel")
    assert (run.last.entry.kind, steps(run)) == ("late_reply", {"hotel": StepStatus.RUNNING})


def test_a_late_no_of_a_step_given_up_on_is_recorded_and_its_undo_goes_on() -> None:
    run = given_up_on_flight()
    run.done("flight", DECLINED)
    assert (run.last.entry.kind, run.last.requests) == ("late_reply", ())
    assert run.instance.steps["flight"].status is StepStatus.UNDOING


def test_a_late_failure_may_have_happened_after_its_undo_and_is_undone_again_once() -> None:
    """It failed after its effect, and its undo had been faster: nobody else would undo it."""
    run = given_up_on_flight()
    run.undone("flight")
    run.done("flight", FAILED)
    assert run.last.entry.kind == "late_failure"
    run.done("flight", FAILED)
    assert (run.last.entry.kind, run.last.requests) == ("late_reply", ())
    run.undone("hotel")
    assert (run.request.step, run.request.direction, run.request.attempt) == ("flight", UNDO, 2)
    run.undone("flight", attempt=2)
    assert run.instance.status is Status.COMPENSATED
    check(run)


@pytest.mark.parametrize("undone", [False, True])
def test_a_repeated_success_is_not_a_late_one(undone: bool) -> None:
    """A step that is undone has succeeded in time; what says so once more is a duplicate."""
    run = at_flight()
    run.done("flight", DECLINED)
    if undone:
        run.undone("hotel")
    run.done("hotel")
    assert (run.last.entry.kind, run.last.requests) == ("late_reply", ())
    assert [each for each in run.asked if each[1] is UNDO] == [("hotel", UNDO, 1)]


def test_a_repeated_failure_is_heard_once() -> None:
    run = at_flight()
    run.done("flight", FAILED)
    run.done("flight", FAILED)
    assert (run.last.entry.kind, run.last.requests) == ("late_reply", ())


def test_a_late_success_while_the_undo_is_outstanding_undoes_again_with_what_is_known_now() -> None:
    run = given_up_on_flight()
    first = run.request
    run.done("flight", outcome=TICKET)
    assert run.last.entry.kind == "late_success"
    assert run.request.command == CancelFlight(trip="t-1", ticket="LH-1")
    assert run.request.attempt == 2
    assert run.request.id != first.id
    run.undone("flight", attempt=1)  # the first compensation may have found nothing
    assert run.last.entry.kind == "late_reply"
    run.undone("flight", attempt=2)
    run.undone("hotel")
    assert run.instance.status is Status.COMPENSATED
    check(run)


def test_a_late_success_while_another_step_is_being_undone_waits_for_its_turn() -> None:
    run = given_up_on_flight()
    run.undone("flight")
    assert run.request.command == CancelHotel(trip="t-1")
    run.done("flight", outcome=TICKET)
    assert run.last.requests == ()
    run.undone("hotel")
    assert run.request.command == CancelFlight(trip="t-1", ticket="LH-1")
    assert run.instance.status is Status.COMPENSATING
    run.undone("flight", attempt=2)
    assert run.instance.status is Status.COMPENSATED
    check(run)


def test_a_command_that_is_sent_again_says_what_it_said_before() -> None:
    """The saga has learnt more in between; but two messages with one id must not differ."""

    class Noting(Saga):
        trip: str
        ticket: str | None = None

        @starts_on(TripWanted)
        def wanted(cls, event: TripWanted) -> "Noting":
            return Noting(trip=event.trip)

        @step
        def hotel(self) -> BookHotel:
            return BookHotel(trip=self.trip)

        @hotel.compensation
        def cancel_hotel(self) -> CancelFlight:
            return CancelFlight(trip=self.trip, ticket=self.ticket)

        @step
        def flight(self) -> BookFlight:
            return BookFlight(trip=self.trip)

        @flight.succeeded
        def booked(self, outcome: FlightBooked) -> None:
            self.ticket = outcome.ticket

        @flight.compensation
        def cancel_flight(self) -> CancelFlight:
            return CancelFlight(trip=self.trip, ticket=self.ticket)

        flow = sequence(hotel, flight)

    run = Run(saga=Noting)
    run.done("hotel")
    run.done("flight", FAILED)
    run.undone("flight", FAILED)
    first = run.request
    assert (first.step, first.command) == ("hotel", CancelFlight(trip="t-1", ticket=None))
    run.done("flight", outcome=TICKET)
    assert run.instance.state["ticket"] == "LH-1"
    run.expire()
    assert (run.request.id, run.request.command) == (first.id, first.command)
    assert run.instance.steps["hotel"].made_of is not None
    assert StepState.from_json(run.instance.steps["hotel"].to_json()) == run.instance.steps["hotel"]
    run.undone("hotel")
    assert run.instance.steps["hotel"].made_of is None
    assert run.request.command == CancelFlight(trip="t-1", ticket="LH-1")


def test_a_late_success_of_a_step_whose_undo_was_not_sent_yet_is_undone() -> None:
    run = given_up_on_flight()
    run.expire()
    waiting = {**run.instance.steps, "flight": StepState(StepStatus.UNKNOWN), "hotel": StepState(StepStatus.UNDOING, 1)}
    run.decisions.append(replace(run.last, instance=replace(run.instance, steps=waiting)))
    run.done("flight", outcome=TICKET)
    assert run.instance.steps["flight"] == StepState(StepStatus.SUCCEEDED, answer=SUCCEEDED)


def test_a_late_success_wakes_a_saga_that_is_compensated_already() -> None:
    run = given_up_on_flight()
    run.undone("flight")
    run.undone("hotel")
    assert run.instance.status is Status.COMPENSATED
    run.done("flight", outcome=TICKET)
    assert run.instance.status is Status.COMPENSATING
    assert run.request.command == CancelFlight(trip="t-1", ticket="LH-1")
    run.undone("flight", attempt=2)
    assert run.instance.status is Status.COMPENSATED
    [_] = (each for decision in run.decisions for each in decision.announcements)  # it is said once
    check(run)


def test_a_late_failure_wakes_a_saga_that_is_compensated_already() -> None:
    run = given_up_on_flight()
    run.undone("flight")
    run.undone("hotel")
    assert run.instance.status is Status.COMPENSATED
    run.done("flight", FAILED)
    assert (run.instance.status, run.request.direction, run.request.attempt) == (Status.COMPENSATING, UNDO, 2)
    run.undone("flight", attempt=2)
    assert run.instance.status is Status.COMPENSATED
    check(run)


def test_a_late_success_is_compensated_only_once() -> None:
    run = given_up_on_flight()
    run.done("flight", outcome=TICKET)
    run.done("flight", outcome=TICKET)
    assert (run.last.entry.kind, run.last.requests) == ("late_reply", ())
    run.undone("flight", attempt=2)
    run.undone("hotel")
    run.done("flight", outcome=TICKET)
    assert run.instance.status is Status.COMPENSATED
    assert [each for each in run.asked if each[0] == "flight"] == [
        *[("flight", DO, 1)] * 3,
        ("flight", UNDO, 1),
        ("flight", UNDO, 2),
    ]
    check(run)


def test_a_late_success_gives_a_failed_compensation_another_try() -> None:
    run = given_up_on_flight()
    run.undone("flight", FAILED)
    run.undone("hotel")
    assert run.instance.status is Status.NEEDS_ATTENTION
    run.done("flight", outcome=TICKET)
    assert run.request.command == CancelFlight(trip="t-1", ticket="LH-1")
    run.undone("flight", attempt=2)
    assert run.instance.status is Status.COMPENSATED
    check(run)


def test_a_success_after_a_technical_failure_is_late_too() -> None:
    run = at_flight()
    run.done("flight", FAILED)
    run.done("flight", outcome=TICKET)
    assert run.request.command == CancelFlight(trip="t-1", ticket="LH-1")


def test_a_compensation_that_breaks_on_a_late_success_leaves_the_others_running() -> None:
    run = given_up_on_flight("cancel_flight late")
    run.done("flight", outcome=TICKET)
    assert run.instance.steps["flight"].status is StepStatus.UNDO_FAILED
    assert run.request.command == CancelHotel(trip="t-1")
    run.undone("hotel")
    assert run.instance.status is Status.NEEDS_ATTENTION
    check(run)


# Compensations that fail


@pytest.mark.parametrize("result", [DECLINED, FAILED])
def test_a_failed_compensation_leaves_the_others_running_and_asks_for_a_person(result: Result) -> None:
    run = at_payment()
    run.done("payment", DECLINED)
    run.undone("flight", result)
    assert run.request.command == CancelHotel(trip="t-1")
    assert run.instance.status is Status.COMPENSATING
    run.undone("hotel")
    assert run.instance.status is Status.NEEDS_ATTENTION
    assert steps(run)["flight"] is StepStatus.UNDO_FAILED
    assert run.announced == []
    check(run)


# Methods that raise


@pytest.mark.parametrize("name", ["hotel", "flight", "payment"])
def test_a_step_whose_method_raises_was_never_sent_and_the_others_are_undone(name: str) -> None:
    run = Run(name)
    for done in ("hotel", "flight"):
        if run.instance.status is Status.RUNNING:
            run.done(done)
    assert run.instance.reason == f"{name} could not be asked for: {name} raised RuntimeError('{name} is broken')"
    assert run.instance.steps[name].status is StepStatus.DECLINED
    while run.instance.status is Status.COMPENSATING:
        run.undone(run.request.step)
    assert run.instance.status is Status.COMPENSATED
    assert (name, UNDO, 1) not in run.asked
    check(run)


def test_a_step_whose_method_raises_when_sent_again_counts_as_unknown() -> None:
    run = at_flight()
    broken = {**run.instance.state, "faults": ["flight"]}
    run.decisions.append(replace(run.last, instance=replace(run.instance, state=broken)))
    run.expire()
    assert run.request.command == CancelFlight(trip="t-1")


@pytest.mark.parametrize("name", ["cancel_flight", "cancel_hotel"])
def test_a_compensation_whose_method_raises_has_failed(name: str) -> None:
    run = at_payment(name)
    run.done("payment", DECLINED)
    while run.instance.status is Status.COMPENSATING:
        run.undone(run.request.step)
    assert run.instance.status is Status.NEEDS_ATTENTION
    assert [at for at in steps(run).values() if at is StepStatus.UNDO_FAILED]
    assert len([each for each in run.asked if each[1] is UNDO]) == 1
    check(run)


def test_a_success_that_cannot_be_taken_in_turns_the_saga_back_and_is_undone() -> None:
    run = at_flight("booked")
    run.done("flight", outcome=TICKET)
    assert run.instance.reason == "flight succeeded, but booked raised RuntimeError('booked is broken')"
    assert run.request.command == CancelFlight(trip="t-1")
    assert run.instance.state == at_flight("booked").instance.state


def test_a_late_success_that_cannot_be_taken_in_is_undone_all_the_same() -> None:
    run = given_up_on_flight("booked")
    run.done("flight", outcome=TICKET)
    assert run.request.attempt == 2
    assert run.instance.state["ticket"] is None


def test_a_no_that_cannot_be_taken_in_is_still_a_no() -> None:
    run = at_flight("full")
    run.done("flight", DECLINED, FlightFull(trip="t-1", reason="full"))
    assert run.instance.reason == "flight declined: flight says no; full raised RuntimeError('full is broken')"
    assert run.instance.state["refusal"] is None
    assert run.request.command == CancelHotel(trip="t-1")


def test_a_completed_method_that_raises_asks_for_a_person() -> None:
    run = at_payment("ready")
    run.done("payment")
    assert run.instance.status is Status.NEEDS_ATTENTION
    assert run.instance.reason == "completed, but ready failed: ready raised RuntimeError('ready is broken')"
    assert run.announced == []
    check(run)


def test_a_compensated_method_that_raises_asks_for_a_person() -> None:
    run = Run("off")
    run.done("hotel", DECLINED)
    assert run.instance.status is Status.NEEDS_ATTENTION
    because = "hotel declined: hotel says no; compensated, but off failed: off raised RuntimeError('off is broken')"
    assert run.instance.reason == because
    check(run)


@pytest.mark.parametrize(
    ("fault", "act"),
    [
        ("flight", lambda: at_flight("flight")),
        ("cancel_hotel", lambda: _then(at_flight("cancel_hotel"), lambda run: run.done("flight", DECLINED))),
        ("ready", lambda: _then(at_payment("ready"), lambda run: run.done("payment"))),
        ("off", lambda: _then(Run("off"), lambda run: run.done("hotel", DECLINED))),
    ],
)
def test_what_a_raising_method_has_assigned_is_forgotten(fault: str, act: Callable[[], Run]) -> None:
    run = act()
    assert fault in (run.instance.reason or "") or run.instance.status is Status.NEEDS_ATTENTION
    assert run.instance.state["refusal"] is None


def _then(run: Run, act: Callable[[Run], object]) -> Run:
    act(run)
    return run


def test_a_raising_start_method_escapes() -> None:
    with pytest.raises(RuntimeError, match="wanted is broken"):
        Run("wanted")


class Careless(Saga):
    """Everything that a method can do wrong without raising; the event says which."""

    trip: str
    faults: tuple[str, ...] = ()
    ticket: str = ""
    seen: list[str] = []  # noqa: RUF012  # pydantic copies it

    @starts_on(TripWanted)
    def wanted(cls, event: TripWanted) -> "Careless":
        return "no saga" if "wanted" in event.faults else Careless(trip=event.trip, faults=event.faults)  # type: ignore[return-value]  # the point

    @step
    def flight(self) -> BookFlight:
        if "unstorable" in self.faults:
            self.ticket = object()  # type: ignore[assignment]  # the point
        if "forgetful" in self.faults:
            self.seen.append("flight")
        return "no command" if "flight" in self.faults else BookFlight(trip=self.trip)  # type: ignore[return-value]  # the point

    @flight.succeeded
    def booked(self, outcome: FlightBooked) -> None:
        self.seen.append(outcome.ticket)
        if "booked" in self.faults:
            self.ticket = 7  # type: ignore[assignment]  # the point
        if "panic" in self.faults:
            raise PanicError

    @flight.compensation
    def cancel(self) -> CancelFlight:
        return "no command" if "cancel" in self.faults else CancelFlight(trip=self.trip)  # type: ignore[return-value]  # the point

    flow = sequence(flight)

    @completed
    def ready(self) -> Event:
        return BookFlight(trip=self.trip) if "ready" in self.faults else TripReady(trip=self.trip, ticket="")  # type: ignore[return-value]  # the point


class PanicError(BaseException):
    """What a Rust extension raises, and nothing that `except Exception` catches; it cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")


def careless(fault: str) -> Run:
    return Run(saga=Careless, event=TripWanted(trip="t-1", faults=(fault,)))


def test_a_start_that_returns_no_saga_escapes() -> None:
    with pytest.raises(TypeError, match=r"Careless.wanted must return a Careless, not 'no saga'"):
        careless("wanted")


def test_a_step_that_returns_no_command_was_never_sent() -> None:
    run = careless("flight")
    assert run.instance.status is Status.COMPENSATED
    assert run.instance.reason == "flight could not be asked for: it must return a Command, not str"
    check(run)


def test_a_compensation_that_returns_no_command_has_failed() -> None:
    run = careless("cancel")
    run.done("flight", FAILED)
    assert run.instance.status is Status.NEEDS_ATTENTION
    check(run)


def test_an_ending_that_returns_no_event_asks_for_a_person() -> None:
    run = careless("ready")
    run.done("flight")
    assert run.instance.reason == "completed, but ready failed: it must return an Event or None, not BookFlight"
    check(run)


def test_an_outcome_that_leaves_a_state_which_cannot_be_stored_is_not_taken_in() -> None:
    run = careless("booked")
    run.done("flight", outcome=TICKET)
    assert "booked left a broken state" in (run.instance.reason or "")
    assert run.instance.state == {"trip": "t-1", "faults": ["booked"], "ticket": "", "seen": []}
    check(run)


def test_a_panic_that_cannot_be_shown_is_an_outcome_like_any_other() -> None:
    run = careless("panic")
    run.done("flight", outcome=TICKET)
    assert run.instance.reason == "flight succeeded, but booked raised PanicError"
    assert run.instance.state["seen"] == []
    assert run.request.command == CancelFlight(trip="t-1")


@pytest.mark.parametrize("fault", ["unstorable", "forgetful"])
def test_a_step_that_changes_the_saga_is_not_sent(fault: str) -> None:
    """What a repeated send says would depend on it; and nobody looks for changes there."""
    run = careless(fault)
    assert run.instance.status is Status.COMPENSATED
    reason = "flight could not be asked for: flight changed the saga, which only a method for an outcome may"
    assert run.instance.reason == reason
    assert run.instance.state["ticket"] == ""
    check(run)


# Ids, history and purity


def test_ids_are_derived_from_what_they_stand_for() -> None:
    run = given_up_on_flight()
    assert run.decisions[0].requests[0].id == derive_id(SAGA_ID, "hotel", "do", 1)
    assert run.request.id == derive_id(SAGA_ID, "flight", "undo", 1)
    run.done("flight", outcome=TICKET)
    assert run.request.id == derive_id(SAGA_ID, "flight", "undo", 2)
    run.undone("flight", attempt=2)
    run.undone("hotel")
    [announcement] = run.last.announcements
    assert announcement.id == derive_id(SAGA_ID, "announce", "compensated")


def test_a_decision_taken_twice_is_the_same_decision() -> None:
    run, again = at_payment(), at_payment()
    run.done("payment", DECLINED)
    again.done("payment", DECLINED)
    assert run.decisions == again.decisions


def test_the_instance_that_is_decided_on_is_not_changed() -> None:
    run = at_flight()
    before = copy.deepcopy(run.instance)
    instance = run.instance
    run.done("flight", outcome=TICKET)
    assert instance == before


def test_every_revision_has_a_history_entry_with_what_changed_and_what_was_sent() -> None:
    run = at_flight()
    run.done("flight", outcome=TICKET)
    entry = run.last.entry
    about = (entry.kind, entry.step, entry.direction, entry.attempt, entry.result)
    assert about == ("reply", "flight", DO, 1, SUCCEEDED)
    assert (entry.message_id, entry.at, entry.status, entry.reason) == ("m-3", run.now, Status.RUNNING, None)
    due = (run.now + timedelta(seconds=300)).isoformat()
    assert entry.change == {
        "state": {"ticket": "LH-1"},
        "steps": {
            "flight": {"status": "succeeded", "attempt": 1, "sends": 1, "command": "book.flight"},
            "payment": {"status": "running", "attempt": 1, "sends": 1, "due_at": due, "command": "pay.trip"},
        },
    }
    assert entry.sent == ({"id": str(run.request.id), "type": "pay.trip", "step": "payment", "direction": "do"},)
    run.done("payment")
    [announcement] = run.last.announcements
    assert run.last.entry.sent == ({"id": str(announcement.id), "type": "trip.ready"},)


def test_the_first_history_entry_holds_the_whole_state() -> None:
    run = Run()
    assert (run.last.entry.kind, run.last.entry.message_id) == ("started", "m-1")
    assert run.last.entry.change["state"] == run.instance.state
    assert list(run.last.entry.change["steps"]) == ["hotel"]


def test_a_deadline_is_recorded_with_its_step() -> None:
    run = Run()
    run.expire()
    assert (run.last.entry.kind, run.last.entry.step) == ("deadline", "hotel")


def test_a_reason_is_kept_to_a_length_that_people_read() -> None:
    run = Run()
    given = Replied("hotel", DO, 1, DECLINED, None, "x" * 10_000, "m", run.now)
    run.take(given)
    assert len(run.instance.reason or "") == 1000


def test_giving_up_says_why_and_leaves_all_as_it_is() -> None:
    run = Run()
    decision = give_up(run.instance, "y" * 2000, run.now)
    assert (decision.instance.status, decision.instance.revision) == (Status.NEEDS_ATTENTION, 2)
    assert decision.instance.due_at is None
    assert decision.instance.steps == run.instance.steps
    assert decision.instance.reason == decision.entry.reason == "y" * 1000
    assert (decision.requests, decision.announcements, decision.entry.kind) == ((), (), "given_up")


def test_only_a_start_needs_no_instance() -> None:
    with pytest.raises(ValueError, match="only a start event needs no instance"):
        decide(Trip.definition, None, Elapsed(START))


def test_a_state_that_the_saga_cannot_read_escapes() -> None:
    run = Run()
    with pytest.raises(ValueError, match="trip"):
        decide(Trip.definition, replace(run.instance, state={}), Elapsed(START + timedelta(days=1)))


def test_a_start_without_a_business_key_escapes() -> None:
    class Keyless(Saga):
        trip: str
        invoice: str | None = None

        @starts_on(TripWanted, key="invoice")
        def wanted(cls, event: TripWanted) -> "Keyless":
            return Keyless(trip=event.trip, invoice=None if event.trip == "none" else "")

        @step
        def hotel(self) -> BookHotel:
            return BookHotel(trip=self.trip)

        flow = sequence(hotel)

    for trip in ("none", "empty"):
        with pytest.raises(ValueError, match=r"Keyless.wanted left its business key 'invoice' empty"):
            decide(Keyless.definition, None, Started(SAGA_ID, TripWanted(trip=trip), "m", START))


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (Failed(code="timeout", reason="no answer", attempts=3), "timeout: no answer"),
        (Refused(reason="too old"), "too old"),
        (FlightFull(trip="t-1", reason="full"), "full"),
        (Succeeded(), "succeeded"),
        (None, ""),
    ],
)
def test_an_outcome_is_described_in_words(outcome: Succeeded | None, words: str) -> None:
    assert describe(outcome) == words
