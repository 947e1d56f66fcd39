"""Two applications that share a broker and nothing else: a shop, and a warehouse that has children of its sagas.

Both start a saga on each order that is placed. Every third order goes nowhere: the shop undoes what the warehouse did.
"""

from typing import Self

from coordinator import App, Saga, sequence, starts_on, step
from events import Command, Event
from handlers import Declined, handles
from tests.support.packing import Pack, Packing, Pick, PutBack, Unpack


class OrderPlaced(Event):
    order: str
    number: int


class Charge(Command):
    order: str
    number: int


class Refund(Command):
    order: str


class Count(Command):
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
    """Of the shop: the warehouse packs, as a saga of its own, and the card is charged."""

    order: str
    number: int

    @starts_on(OrderPlaced)
    @classmethod
    def placed(cls, event: OrderPlaced) -> Self:
        return cls(order=event.order, number=event.number)

    @step(timeout=60)
    def pack(self) -> Pack:
        return Pack(order=self.order)

    @pack.compensation
    def unpack(self) -> Unpack:
        return Unpack(order=self.order)

    @step(timeout=60)
    def charge(self) -> Charge:
        return Charge(order=self.order, number=self.number)

    flow = sequence(pack, charge)


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
warehouse = App("warehouse", sagas=[Packing, Statistics], handlers=[pick, put_back, count])
