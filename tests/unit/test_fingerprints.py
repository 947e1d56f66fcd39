"""What a saga may change under its version number, and what it may not."""

from collections.abc import Callable
from typing import Self

import pytest

from coordinator import Backoff, Saga, parallel, sequence, starts_on, step, when
from coordinator.catalog.place_order import PlaceOrder
from coordinator.fingerprints import differences, fingerprint, structure
from coordinator.flow import Node
from events.message import Command
from tests.support.sagas import BookFlight, BookHotel, CancelHotel, Trip, TripWanted
from tests.support.trips import booking, is_far, saga


class Small(Saga):
    trip: str

    @starts_on(TripWanted)
    @classmethod
    def wanted(cls, event: TripWanted) -> Self:
        return cls(trip=event.trip)

    @step(timeout=10)
    def hotel(self) -> BookHotel:
        return BookHotel(trip=self.trip)

    flow = sequence(hotel)


class Patient(Small, name="small", deadline=60):
    """The same with other deadlines, another state and other words."""

    nights: int = 1

    @step(timeout=20, resends=3, recovery=Backoff(2))
    def hotel(self) -> BookHotel:
        return BookHotel(trip=f"{self.trip} for {self.nights}")

    flow = sequence(hotel)


class Flying(Small, name="small"):
    @step
    def hotel(self) -> BookFlight | BookHotel:
        return BookFlight(trip=self.trip)

    flow = sequence(hotel)


class Undone(Small, name="small"):
    @step
    def hotel(self) -> BookHotel:
        return BookHotel(trip=self.trip)

    @hotel.compensation
    def cancel(self) -> CancelHotel:
        return CancelHotel(trip=self.trip)

    flow = sequence(hotel)


class Vague(Small, name="small"):
    @step
    def hotel(self) -> Command:
        return BookHotel(trip=self.trip)

    flow = sequence(hotel)


def changed(before: type[Saga], after: type[Saga]) -> list[str]:
    old, new = structure(before.definition), structure(after.definition)
    found = differences(old, new)
    assert (fingerprint(old) == fingerprint(new)) is (not found)
    return found


def test_deadlines_retries_state_and_words_may_change() -> None:
    assert changed(Small, Patient) == []


@pytest.mark.parametrize(
    ("after", "what"),
    [
        (Flying, "command of step hotel was book.hotel, is book.flight | book.hotel"),
        (Undone, "compensation of step hotel was nothing, is cancel.hotel"),
        (Vague, "command of step hotel was book.hotel, is command"),
    ],
)
def test_commands_and_compensations_may_not(after: type[Saga], what: str) -> None:
    assert changed(Small, after) == [what]


def made(flow: Callable[[], Node]) -> type[Saga]:
    return saga(flow())


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        (
            lambda: sequence(booking("a"), booking("b")),
            lambda: sequence(booking("a"), booking("c")),
            ["step b is gone", "step c is new", "the flow was sequence(a, b), is sequence(a, c)"],
        ),
        (
            lambda: sequence(booking("a"), booking("b")),
            lambda: sequence(booking("b"), booking("a")),
            ["the flow was sequence(a, b), is sequence(b, a)"],
        ),
        (
            lambda: sequence(booking("a"), booking("b")),
            lambda: parallel(booking("a"), booking("b")),
            ["the flow was sequence(a, b), is parallel(a, b)"],
        ),
        (
            lambda: sequence(booking("a"), when(is_far, booking("b"))),
            lambda: sequence(booking("a"), when(is_far, booking("b"), otherwise=booking("c"))),
            [
                "step c is new",
                "the flow was sequence(a, when(is_far, b)), is sequence(a, when(is_far, b, otherwise=c))",
            ],
        ),
        (
            lambda: sequence(booking("a", undone=False)),
            lambda: sequence(booking("a", undone=False, pivot=True)),
            ["pivot of step a was False, is True"],
        ),
    ],
)
def test_steps_their_order_and_their_kinds_may_not(
    before: Callable[[], Node], after: Callable[[], Node], what: list[str]
) -> None:
    assert changed(made(before), made(before)) == []
    assert changed(made(before), made(after)) == what


def test_what_an_outcome_is_may_not() -> None:
    like = structure(Trip.definition)
    assert like["steps"]["flight"] == {
        "command": "book.flight",
        "compensation": "cancel.flight",
        "declined": "flight.full",
        "pivot": False,
        "succeeded": "flight.booked",
    }


def test_a_fingerprint_stays_the_same_from_release_to_release() -> None:
    """If this fails, every deployment is refused after an upgrade: migrate what is stored in `saga_version`, too."""
    known = "5cde96549ad763ad0ad5f2983a023ade5a6ec37a2fc789e91a3e29da11053618"
    assert fingerprint(structure(PlaceOrder.definition)) == known
