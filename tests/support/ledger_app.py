"""An application whose every effect can be counted: sagas that move money and goods, and leave a ledger.

`run` it with LEDGER_URL set to the database that holds the ledger. Each order's id says what becomes of it.
"""

import os
from collections.abc import AsyncIterator
from typing import Self
from uuid import UUID

from dishka import Provider, Scope, provide
from sqlalchemy import Column, Engine, Integer, MetaData, Table, Text, Uuid, bindparam, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from coordinator import App, Saga, compensated, completed, sequence, starts_on, step
from events import Command, Event, Reply, ServiceOutbox
from events.database import open_database
from events.ids import TimeOrderedIds
from handlers import Context, Declined, Retry, handles

TIMEOUT = float(os.environ.get("LEDGER_TIMEOUT", "120"))  # seconds for each step
RESENDS = int(os.environ.get("LEDGER_RESENDS", "0"))  # of each command, and of each that undoes it

tables = MetaData()

# What handlers did in the transaction of their message.
inside = Table(
    "ledger_inside",
    tables,
    Column("entry", Integer, primary_key=True),
    Column("order_id", Uuid, nullable=False),
    Column("what", Text, nullable=False),
)

# What handlers did outside of it, as third parties do: once for each idempotency key, with a count of repeats.
outside = Table(
    "ledger_outside",
    tables,
    Column("key", Text, primary_key=True),
    Column("order_id", Uuid, nullable=False),
    Column("what", Text, nullable=False),
    Column("calls", Integer, nullable=False),
)


class Ledger:
    """A third party with a memory for idempotency keys."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def enter(self, key: str, order_id: UUID, what: str) -> None:
        statement = text(
            "INSERT INTO ledger_outside (key, order_id, what, calls) VALUES (:key, :order_id, :what, 1)"
            " ON CONFLICT (key) DO UPDATE SET calls = ledger_outside.calls + 1"
        ).bindparams(bindparam("order_id", type_=Uuid))
        async with self._engine.begin() as connection:
            await connection.execute(statement, {"key": key, "order_id": order_id, "what": what})


class LedgerProvider(Provider):
    scope = Scope.APP

    @provide
    async def ledger(self) -> AsyncIterator[Ledger]:
        engine = open_database(os.environ["LEDGER_URL"])
        yield Ledger(engine)
        await engine.dispose()


class OrderPlaced(Event):
    order_id: UUID
    number: int


class OrderDone(Event):
    order_id: UUID


class OrderUndone(Event):
    order_id: UUID
    reason: str


class Reserve(Command):
    order_id: UUID


class Release(Command):
    order_id: UUID


class Charge(Command):
    order_id: UUID


class Refund(Command):
    order_id: UUID


class Ship(Command):
    order_id: UUID
    number: int


class Charged(Reply):
    charge: str


class ShipmentRefused(Event):
    order_id: UUID
    reason: str


async def _enter(session: AsyncSession, order_id: UUID, what: str) -> None:
    await session.execute(inside.insert().values(order_id=order_id, what=what))


@handles(Reserve)
async def reserve(command: Reserve, session: AsyncSession) -> None:
    await _enter(session, command.order_id, "reserve")


@handles(Release)
async def release(command: Release, session: AsyncSession) -> None:
    await _enter(session, command.order_id, "release")


PATIENT = Retry(attempts=60, first=0.2, most=1.0)  # the third party is in the database that the tests restart


@handles(Charge, retry=PATIENT, timeout=5)
async def charge(command: Charge, ledger: Ledger, context: Context) -> Charged:
    await ledger.enter(context.idempotency_key, command.order_id, "charge")
    return Charged(charge=context.idempotency_key)


@handles(Refund, retry=PATIENT, timeout=5)
async def refund(command: Refund, ledger: Ledger, context: Context) -> None:
    await ledger.enter(context.idempotency_key, command.order_id, "refund")


@handles(Ship)
async def ship(command: Ship, session: AsyncSession) -> None:
    if command.number % 5 == 0:
        raise Declined(ShipmentRefused(order_id=command.order_id, reason="no such address"))
    await _enter(session, command.order_id, "ship")


class Order(Saga):
    """Reserve, charge, ship; every fifth shipment is refused, and all is undone."""

    order_id: UUID
    number: int
    charge_key: str | None = None

    @starts_on(OrderPlaced)
    @classmethod
    def placed(cls, event: OrderPlaced) -> Self:
        return cls(order_id=event.order_id, number=event.number)

    @step(timeout=TIMEOUT, resends=RESENDS)
    def reserve_goods(self) -> Reserve:
        return Reserve(order_id=self.order_id)

    @reserve_goods.compensation(resends=RESENDS)
    def release_goods(self) -> Release:
        return Release(order_id=self.order_id)

    @step(timeout=TIMEOUT, resends=RESENDS)
    def charge_card(self) -> Charge:
        return Charge(order_id=self.order_id)

    @charge_card.succeeded
    def charged(self, outcome: Charged) -> None:
        self.charge_key = outcome.charge

    @charge_card.compensation(resends=RESENDS)
    def refund_card(self) -> Refund:
        return Refund(order_id=self.order_id)

    @step(timeout=TIMEOUT, resends=RESENDS)
    def ship_goods(self) -> Ship:
        return Ship(order_id=self.order_id, number=self.number)

    flow = sequence(reserve_goods, charge_card, ship_goods)

    @completed
    def done(self) -> OrderDone:
        return OrderDone(order_id=self.order_id)

    @compensated
    def undone(self, reason: str) -> OrderUndone:
        return OrderUndone(order_id=self.order_id, reason=reason)


def place_orders(database: Engine, count: int) -> list[UUID]:
    """Leave orders in the outbox, as a service would; return their ids."""
    ids, outbox = TimeOrderedIds(), ServiceOutbox("/shop")
    placed = []
    with Session(database) as session, session.begin():
        for number in range(count):
            placed.append(ids.new())
            outbox.add(session, OrderPlaced(order_id=placed[-1], number=number), id=str(placed[-1]))
    return placed


app = App(
    "ledger",
    sagas=[Order],
    handlers=[reserve, release, charge, refund, ship],
    resources=[LedgerProvider()],
    tables=[tables],
)
