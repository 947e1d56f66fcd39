"""Two applications that share a broker and nothing else: a shop, and a warehouse that has children of its sagas.

Both start a saga on each order that is placed. Every third order goes nowhere: the shop undoes what the warehouse did.
"""

from typing import Self

from coordinator import App, Saga, completed, sequence, starts_on, step
from events import Command, Event
from handlers import Declined, handles


class OrderPlaced(Event):
    order: str
    number: int


class Charge(Command):
    order: str
    number: int


class Refund(Command):
    order: str


class Deliver(Command):
    order: str


class FetchBack(Command):
    order: str


class Pick(Command):
    order: str


class PutBack(Command):
    order: str


class Count(Command):
    order: str


class Delivered(Event):
    order: str


@handles(Charge)
async def charge(command: Charge) -> None:
    if command.number % 3 == 0:
        raise Declined("the card is empty")


@handles(Pick)
async def pick(command: Pick) -> None:
    assert command.order


@handles(PutBack)
async def put_back(command: PutBack) -> None:
    assert command.order


@handles(Count)
async def count(command: Count) -> None:
    assert command.order


class Order(Saga):
    """Of the shop: the warehouse delivers, as a saga of its own, and the card is charged."""

    order: str
    number: int

    @starts_on(OrderPlaced)
    @classmethod
    def placed(cls, event: OrderPlaced) -> Self:
        return cls(order=event.order, number=event.number)

    @step(timeout=60)
    def deliver(self) -> Deliver:
        return Deliver(order=self.order)

    @deliver.compensation
    def fetch_back(self) -> FetchBack:
        return FetchBack(order=self.order)

    @step(timeout=60)
    def charge(self) -> Charge:
        return Charge(order=self.order, number=self.number)

    flow = sequence(deliver, charge)


class Delivery(Saga):
    """Of the warehouse: the child of an order."""

    order: str

    @starts_on(Deliver, undone_by=FetchBack)
    @classmethod
    def wanted(cls, command: Deliver) -> Self:
        return cls(order=command.order)

    @step(timeout=60)
    def pick(self) -> Pick:
        return Pick(order=self.order)

    @pick.compensation
    def put_back(self) -> PutBack:
        return PutBack(order=self.order)

    flow = sequence(pick)

    @completed
    def delivered(self) -> Delivered:
        return Delivered(order=self.order)


class Statistics(Saga):
    """Of the warehouse: hears of orders, too."""

    order: str

    @starts_on(OrderPlaced)
    @classmethod
    def placed(cls, event: OrderPlaced) -> Self:
        return cls(order=event.order)

    @step(timeout=60)
    def count(self) -> Count:
        return Count(order=self.order)

    flow = sequence(count)


shop = App("shop", sagas=[Order], handlers=[charge])
warehouse = App("warehouse", sagas=[Delivery, Statistics], handlers=[pick, put_back, count])
