"""What an application says of itself: the queues that it consumes."""

from typing import Self

import pytest

from coordinator import App, Saga, awaits, sequence, starts_on, step
from events import Command, Event
from handlers import handles
from tests.support.packing import Pack, Packing


class Wanted(Event):
    order: str


class Paid(Event):
    order: str


class Throw(Command):
    order: str


class Order(Saga):
    order: str

    @starts_on(Wanted)
    @classmethod
    def wanted(cls, event: Wanted) -> Self:
        return cls(order=event.order)

    @awaits(Paid, by="order", timeout=60)
    def payment(self, event: Paid) -> None:
        assert event.order

    flow = sequence(payment)


class NewOrder(Saga, name="order", version=2):
    """Waits for nothing any more."""

    order: str

    @starts_on(Wanted)
    @classmethod
    def wanted(cls, event: Wanted) -> Self:
        return cls(order=event.order)

    @step
    def throw(self) -> Throw:
        return Throw(order=self.order)

    flow = sequence(throw)


class NewPacking(Saga, name="packing", version=2):
    """Cannot be undone any more."""

    order: str

    @starts_on(Pack)
    @classmethod
    def wanted(cls, command: Pack) -> Self:
        return cls(order=command.order)

    @step
    def throw(self) -> Throw:
        return Throw(order=self.order)

    flow = sequence(throw)


@handles(Throw)
async def throw(command: Throw) -> None:
    assert command.order


def keys_of(app: App) -> dict[str, list[str]]:
    return {queue.name: [address.key for address in queue.bindings] for queue in app.queues}


def test_two_applications_on_one_broker_have_coordinators_with_queues_of_their_own() -> None:
    assert keys_of(App("shop", sagas=[Order, Packing], handlers=[throw])) == {
        "handler.throw": ["throw"],
        "coordinator.shop.events": ["paid", "wanted"],
        "coordinator.shop.replies": ["coordinator.shop"],
        "coordinator.shop.commands": ["pack", "unpack"],
    }
    assert not keys_of(App("one", sagas=[Order])).keys() & keys_of(App("other", sagas=[Order])).keys()


def test_an_application_without_sagas_has_no_queues_for_a_coordinator() -> None:
    assert keys_of(App("hands", handlers=[throw])) == {"handler.throw": ["throw"]}


@pytest.mark.parametrize("retired", [True, False])
def test_what_only_an_old_version_waits_for_or_is_undone_by_still_arrives(*, retired: bool) -> None:
    new, old = [NewOrder, NewPacking], [Order, Packing]
    app = App("shop", sagas=new, retired=old) if retired else App("shop", sagas=[*new, *old])

    keys = keys_of(app)

    assert keys["coordinator.shop.events"] == ["paid", "wanted"]
    assert keys["coordinator.shop.commands"] == ["pack", "unpack"]
