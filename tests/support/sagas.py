"""Sagas that tests share, and a way to decide on one by hand."""

from datetime import timedelta
from typing import Self

from coordinator.decision import Decision, Elapsed, Replied, Request
from coordinator.definition import Saga
from coordinator.flow import sequence
from coordinator.steps import compensated, completed, starts_on, step
from coordinator.testing import BEGIN as START
from coordinator.testing import SAGA_ID, SagaRun
from events.envelope import Direction, Result
from events.message import Command, Event, Message, Reply

__all__ = ["SAGA_ID", "START"]


class TripWanted(Event):
    """`faults` name the methods of the saga that shall raise; "late" after one: only once the ticket is known."""

    trip: str
    faults: tuple[str, ...] = ()


class BookHotel(Command):
    trip: str


class CancelHotel(Command):
    trip: str


class BookFlight(Command):
    trip: str


class CancelFlight(Command):
    trip: str
    ticket: str | None = None


class PayTrip(Command):
    trip: str


class RefundTrip(Command):
    trip: str


class FlightBooked(Reply):
    ticket: str


class FlightFull(Event):
    trip: str
    reason: str


class TripReady(Event):
    trip: str
    ticket: str | None


class TripOff(Event):
    trip: str
    reason: str


class Trip(Saga):
    """Hotel, flight, payment: all of them or none."""

    trip: str
    faults: tuple[str, ...] = ()
    ticket: str | None = None
    refusal: str | None = None

    @starts_on(TripWanted)
    @classmethod
    def wanted(cls, event: TripWanted) -> Self:
        if "wanted" in event.faults:
            raise RuntimeError("wanted is broken")
        return cls(trip=event.trip, faults=event.faults)

    @step(timeout=10)
    def hotel(self) -> BookHotel:
        self.fail_if_told("hotel")
        return BookHotel(trip=self.trip)

    @hotel.compensation(timeout=5, resends=1)
    def cancel_hotel(self) -> CancelHotel:
        self.fail_if_told("cancel_hotel")
        return CancelHotel(trip=self.trip)

    @step(timeout=20, resends=2)
    def flight(self) -> BookFlight:
        self.fail_if_told("flight")
        return BookFlight(trip=self.trip)

    @flight.succeeded
    def booked(self, outcome: FlightBooked) -> None:
        self.ticket = outcome.ticket
        self.fail_if_told("booked")

    @flight.declined
    def full(self, outcome: FlightFull) -> None:
        self.refusal = outcome.reason
        self.fail_if_told("full")

    @flight.compensation
    def cancel_flight(self) -> CancelFlight:
        self.fail_if_told("cancel_flight")
        return CancelFlight(trip=self.trip, ticket=self.ticket)

    @step
    def payment(self) -> PayTrip:
        self.fail_if_told("payment")
        return PayTrip(trip=self.trip)

    @payment.compensation
    def refund(self) -> RefundTrip:
        self.fail_if_told("refund")
        return RefundTrip(trip=self.trip)

    flow = sequence(hotel, flight, payment)

    @completed
    def ready(self) -> TripReady:
        self.fail_if_told("ready")
        return TripReady(trip=self.trip, ticket=self.ticket)

    @compensated
    def off(self, reason: str) -> TripOff:
        self.fail_if_told("off")
        return TripOff(trip=self.trip, reason=reason)

    def fail_if_told(self, method: str) -> None:
        if method in self.faults or (self.ticket is not None and f"{method} late" in self.faults):
            self.refusal = f"{method} was here"
            raise RuntimeError(f"{method} is broken")


class NewTrip(Saga, name="trip", version=2):
    """A trip that needs nothing but a hotel."""

    trip: str

    @starts_on(TripWanted)
    @classmethod
    def wanted(cls, event: TripWanted) -> Self:
        return cls(trip=event.trip)

    @step
    def hotel(self) -> BookHotel:
        return BookHotel(trip=self.trip)

    flow = sequence(hotel)


class Run(SagaRun):
    """A run of `Trip` by default, in the shorter words of the tests of the core."""

    def __init__(self, *faults: str, saga: type[Saga] = Trip, event: Event | None = None) -> None:
        super().__init__(saga, event or TripWanted(trip="t-1", faults=faults))

    @property
    def request(self) -> Request:
        """The only command that the last decision sends."""
        [request] = self.last.requests
        return request

    @property
    def asked(self) -> list[tuple[str, Direction, int]]:
        """All that was ever asked for, in order."""
        return [(each.step, each.direction, each.attempt) for decision in self.decisions for each in decision.requests]

    @property
    def announced(self) -> list[Event]:
        return self.published

    def replied(
        self, step_name: str, direction: Direction, result: Result, outcome: Message | None = None, attempt: int = 1
    ) -> Decision:
        detail = "" if result is Result.SUCCEEDED else f"{step_name} says no"
        given = Replied(step_name, direction, attempt, result, outcome, detail, self._message_id(), self.now)
        decision = self.take(given)
        assert decision is not None
        return decision

    def done(self, step_name: str, result: Result = Result.SUCCEEDED, outcome: Message | None = None) -> Decision:
        return self.replied(step_name, Direction.DO, result, outcome)

    def undone(self, step_name: str, result: Result = Result.SUCCEEDED, attempt: int = 1) -> Decision:
        return self.replied(step_name, Direction.UNDO, result, attempt=attempt)

    def pass_time(self, seconds: float) -> Decision | None:
        self.now += timedelta(seconds=seconds)
        return self.take(Elapsed(self.now))

    def expire(self) -> Decision:
        """Let the earliest deadline pass."""
        self.gives_no_answer()
        return self.last
