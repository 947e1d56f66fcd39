"""The ledger application in another version, and on its way back: `second` packs what it ships, `back` no more.

`first` is the ledger application as it was.
"""

from typing import Self
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from coordinator import App, Saga, compensated, completed, migrates, sequence, starts_on, step
from events import Command
from handlers import handles
from tests.support.ledger_app import (
    TIMEOUT,
    Charge,
    Charged,
    LedgerProvider,
    Order,
    OrderDone,
    OrderPlaced,
    OrderUndone,
    Refund,
    Release,
    Reserve,
    Ship,
    charge,
    inside,
    refund,
    release,
    reserve,
    ship,
    tables,
)
from tests.support.ledger_app import app as first

__all__ = ["back", "first", "second"]


class Pack(Command):
    order_id: UUID


@handles(Pack)
async def pack(command: Pack, session: AsyncSession) -> None:
    await session.execute(inside.insert().values(order_id=command.order_id, what="pack"))


class Packed(Saga, name="order", version=2):
    """Reserve, charge, pack, ship."""

    order_id: UUID
    number: int
    charge_key: str | None = None
    boxes: int = 1

    @starts_on(OrderPlaced)
    @classmethod
    def placed(cls, event: OrderPlaced) -> Self:
        return cls(order_id=event.order_id, number=event.number)

    @migrates(1)
    @classmethod
    def packed_too(cls, old: Order) -> Self:
        if old.number % 10 == 3:
            raise ValueError("this customer wants no box")
        return cls(order_id=old.order_id, number=old.number, charge_key=old.charge_key)

    @step(timeout=TIMEOUT)
    def reserve_goods(self) -> Reserve:
        return Reserve(order_id=self.order_id)

    @reserve_goods.compensation
    def release_goods(self) -> Release:
        return Release(order_id=self.order_id)

    @step(timeout=TIMEOUT)
    def charge_card(self) -> Charge:
        return Charge(order_id=self.order_id)

    @charge_card.succeeded
    def charged(self, outcome: Charged) -> None:
        self.charge_key = outcome.charge

    @charge_card.compensation
    def refund_card(self) -> Refund:
        return Refund(order_id=self.order_id)

    @step(timeout=TIMEOUT)
    def pack_goods(self) -> Pack:
        return Pack(order_id=self.order_id)

    @step(timeout=TIMEOUT)
    def ship_goods(self) -> Ship:
        return Ship(order_id=self.order_id, number=self.number)

    flow = sequence(reserve_goods, charge_card, pack_goods, ship_goods)

    @completed
    def done(self) -> OrderDone:
        return OrderDone(order_id=self.order_id)

    @compensated
    def undone(self, reason: str) -> OrderUndone:
        return OrderUndone(order_id=self.order_id, reason=reason)


class OrderAgain(Order, name="order", version=1):
    """Version 1, which knows the way back."""

    @migrates(2)
    @classmethod
    def unpacked(cls, old: Packed) -> Self:
        return cls(order_id=old.order_id, number=old.number, charge_key=old.charge_key)


_handlers = [reserve, release, charge, refund, pack, ship]
second = App(
    "ledger",
    sagas=[Packed],
    retired=[Order],
    handlers=_handlers,
    resources=[LedgerProvider()],
    tables=[tables],
)
back = App(
    "ledger",
    sagas=[OrderAgain],
    retired=[Packed],
    handlers=_handlers,
    resources=[LedgerProvider()],
    tables=[tables],
)
