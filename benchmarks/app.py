"""The application that is measured: sagas whose handlers do nothing but answer."""

from typing import Self
from uuid import UUID

from coordinator import App, Saga, completed, each, parallel, sequence, starts_on, step
from events import Command, Event, Reply
from handlers import handles


class OrderPlaced(Event):
    order_id: UUID
    amount: int


class BasketPlaced(Event):
    order_id: UUID


class BulkPlaced(Event):
    order_id: UUID
    parcels: int


class OrderCompleted(Event):
    order_id: UUID


class ReserveStock(Command):
    order_id: UUID


class ReleaseStock(Command):
    order_id: UUID


class ChargeCard(Command):
    order_id: UUID
    amount: int


class RefundCard(Command):
    charge_id: str | None


class CardCharged(Reply):
    charge_id: str


class ShipOrder(Command):
    order_id: UUID


@handles(ReserveStock, concurrency=256)
async def reserve_stock(command: ReserveStock) -> None:
    """Answer at once."""


@handles(ReleaseStock, concurrency=256)
async def release_stock(command: ReleaseStock) -> None:
    """Answer at once."""


@handles(ChargeCard, concurrency=256)
async def charge_card(command: ChargeCard) -> CardCharged:
    """Answer at once."""
    return CardCharged(charge_id=f"charge-{command.order_id}")


@handles(RefundCard, concurrency=256)
async def refund_card(command: RefundCard) -> None:
    """Answer at once."""


@handles(ShipOrder, concurrency=256)
async def ship_order(command: ShipOrder) -> None:
    """Answer at once."""


class ThreeSteps(Saga):
    """The saga that every number is about: start, three commands, three replies."""

    order_id: UUID
    amount: int
    charge_id: str | None = None

    @starts_on(OrderPlaced)
    @classmethod
    def placed(cls, event: OrderPlaced) -> Self:
        return cls(order_id=event.order_id, amount=event.amount)

    @step
    def reserve(self) -> ReserveStock:
        return ReserveStock(order_id=self.order_id)

    @reserve.compensation
    def release(self) -> ReleaseStock:
        return ReleaseStock(order_id=self.order_id)

    @step
    def charge(self) -> ChargeCard:
        return ChargeCard(order_id=self.order_id, amount=self.amount)

    @charge.succeeded
    def charged(self, outcome: CardCharged) -> None:
        self.charge_id = outcome.charge_id

    @charge.compensation
    def refund(self) -> RefundCard:
        return RefundCard(charge_id=self.charge_id)

    @step
    def ship(self) -> ShipOrder:
        return ShipOrder(order_id=self.order_id)

    flow = sequence(reserve, charge, ship)

    @completed
    def announce(self) -> OrderCompleted | None:
        """Tell the latency benchmark, which orders for nothing; the others are counted in the store."""
        return OrderCompleted(order_id=self.order_id) if self.amount == 0 else None


class SideBySide(Saga):
    """The same three steps, at the same time."""

    order_id: UUID

    @starts_on(BasketPlaced)
    @classmethod
    def placed(cls, event: BasketPlaced) -> Self:
        return cls(order_id=event.order_id)

    @step
    def reserve(self) -> ReserveStock:
        return ReserveStock(order_id=self.order_id)

    @step
    def charge(self) -> ChargeCard:
        return ChargeCard(order_id=self.order_id, amount=1)

    @step
    def ship(self) -> ShipOrder:
        return ShipOrder(order_id=self.order_id)

    flow = parallel(reserve, charge, ship)


class Bulk(Saga):
    """One step for each of many items."""

    order_id: UUID
    parcels: int

    @starts_on(BulkPlaced)
    @classmethod
    def placed(cls, event: BulkPlaced) -> Self:
        return cls(order_id=event.order_id, parcels=event.parcels)

    def all_parcels(self) -> list[int]:
        return list(range(self.parcels))

    @step(timeout=3600)
    def ship(self, item: int) -> ShipOrder:
        return ShipOrder(order_id=UUID(int=self.order_id.int ^ item))

    flow = sequence(each(all_parcels, ship, limit=500))


app = App(
    "benchmark",
    sagas=[ThreeSteps, SideBySide, Bulk],
    handlers=[reserve_stock, release_stock, charge_card, refund_card, ship_order],
)
