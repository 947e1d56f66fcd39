"""A box office in one file: a service with a table of its own, a saga, its handlers, and a unit test of the saga.

    python examples/box_office.py       sells three tickets, two of them for the same seat
    pytest examples/box_office.py       runs the unit test

The service writes the order and the event in one transaction, through the outbox: either both are there or none.
"""

import asyncio
import tempfile
from pathlib import Path
from uuid import UUID, uuid4

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from coordinator import App, Saga, compensated, completed, sequence, starts_on, step
from coordinator.node import Node
from coordinator.settings import Settings
from coordinator.testing import SagaRun
from events import Command, Event, ServiceOutbox
from handlers import Declined, handles

# What is said


class TicketOrdered(Event):
    order_id: UUID
    seat: str
    card: str


class TicketSold(Event):
    order_id: UUID


class TicketNotSold(Event):
    order_id: UUID
    reason: str


class HoldSeat(Command):
    order_id: UUID
    seat: str


class FreeSeat(Command):
    order_id: UUID


class ChargeCard(Command):
    order_id: UUID
    card: str


# The service: its tables, and what its web page would call


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "ticket_order"
    id: Mapped[UUID] = mapped_column(primary_key=True)
    state: Mapped[str]


class Seat(Base):
    __tablename__ = "seat"
    name: Mapped[str] = mapped_column(primary_key=True)
    order_id: Mapped[UUID]


outbox = ServiceOutbox("/box-office/web")


async def order_ticket(session: AsyncSession, seat: str, card: str) -> UUID:
    order = Order(id=uuid4(), state="ordered")
    session.add(order)
    outbox.add(session, TicketOrdered(order_id=order.id, seat=seat, card=card))
    return order.id


# Who acts. A handler that asks for an AsyncSession works in the transaction in which its message is recorded.


@handles(HoldSeat)
async def hold_seat(command: HoldSeat, session: AsyncSession) -> None:
    try:
        async with session.begin_nested():
            await session.execute(insert(Seat).values(name=command.seat, order_id=command.order_id))
    except IntegrityError as error:
        raise Declined(f"seat {command.seat} is taken") from error


@handles(FreeSeat)
async def free_seat(command: FreeSeat, session: AsyncSession) -> None:
    await session.execute(delete(Seat).where(Seat.order_id == command.order_id))


@handles(ChargeCard)
async def charge_card(command: ChargeCard) -> None:
    if command.card == "stolen":
        raise Declined("the card was reported stolen")


@handles(TicketSold)
async def mark_sold(event: TicketSold, session: AsyncSession) -> None:
    (await session.get_one(Order, event.order_id)).state = "sold"


@handles(TicketNotSold)
async def mark_not_sold(event: TicketNotSold, session: AsyncSession) -> None:
    (await session.get_one(Order, event.order_id)).state = f"not sold: {event.reason}"


# Who keeps track


class SellTicket(Saga):
    """Hold the seat, charge the card. Free the seat if that fails."""

    order_id: UUID
    seat: str
    card: str

    @starts_on(TicketOrdered)
    @classmethod
    def ordered(cls, event: TicketOrdered) -> "SellTicket":
        return cls(order_id=event.order_id, seat=event.seat, card=event.card)

    @step(timeout=30)
    def hold(self) -> HoldSeat:
        return HoldSeat(order_id=self.order_id, seat=self.seat)

    @hold.compensation
    def free(self) -> FreeSeat:
        return FreeSeat(order_id=self.order_id)

    @step(timeout=30)
    def charge(self) -> ChargeCard:
        return ChargeCard(order_id=self.order_id, card=self.card)

    flow = sequence(hold, charge)

    @completed
    def announce(self) -> TicketSold:
        return TicketSold(order_id=self.order_id)

    @compensated
    def withdraw(self, reason: str) -> TicketNotSold:
        return TicketNotSold(order_id=self.order_id, reason=reason)


app = App(
    "box-office",
    sagas=[SellTicket],
    handlers=[hold_seat, free_seat, charge_card, mark_sold, mark_not_sold],
    tables=[Base.metadata],
)


def test_a_stolen_card_frees_the_seat() -> None:
    order = TicketOrdered(order_id=uuid4(), seat="A1", card="stolen")
    run = SagaRun(SellTicket, order)
    run.succeeds().declines("the card was reported stolen")
    assert run.sent == [FreeSeat(order_id=order.order_id)]
    assert run.succeeds().status == "compensated"


async def sell(folder: Path) -> None:
    async with Node(app, Settings(database_url=f"sqlite:///{folder / 'tickets.db'}")) as node:
        sessions = async_sessionmaker(node.engine)
        for seat, card in (("A1", "good"), ("A1", "good"), ("A2", "stolen")):
            async with sessions.begin() as session:
                await order_ticket(session, seat, card)
        while True:
            async with sessions() as session:
                states = (await session.scalars(select(Order.state).order_by(Order.state))).all()
            if "ordered" not in states:
                break
            await asyncio.sleep(0.05)
        print("\n".join(states))  # noqa: T201  # it is a program


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        asyncio.run(sell(Path(place)))
