"""Stock, in the database: what is reserved is no longer available."""

from uuid import UUID

from sqlalchemy import Select, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from events.catalog.orders import ReleaseStock, ReserveStock, StockShort
from handlers.catalog.tables import stock_item, stock_reservation
from handlers.context import Declined
from handlers.definition import handles


@handles(ReserveStock)
async def reserve_stock(command: ReserveStock, session: AsyncSession) -> None:
    """Set goods aside, once; decline if there are too few, or if the order was released before this arrived."""
    known = (await session.execute(_reservation(command.order_id))).first()
    if known is not None:
        if known.state == "reserved":
            return
        raise Declined(StockShort(sku=command.sku, reason="the order was released before it was reserved"))
    taken = await session.execute(
        update(stock_item)
        .where(stock_item.c.sku == command.sku, stock_item.c.available >= command.quantity)
        .values(available=stock_item.c.available - command.quantity)
        .returning(stock_item.c.sku)
    )
    if taken.first() is None:
        raise Declined(StockShort(sku=command.sku, reason=f"fewer than {command.quantity} of {command.sku} left"))
    await session.execute(
        insert(stock_reservation).values(
            order_id=command.order_id, sku=command.sku, quantity=command.quantity, state="reserved"
        )
    )


@handles(ReleaseStock)
async def release_stock(command: ReleaseStock, session: AsyncSession) -> None:
    """Put the goods back, once. Where nothing was reserved, leave a tombstone: the reservation may come later."""
    found = (await session.execute(_reservation(command.order_id).with_for_update())).first()
    if found is None:
        await session.execute(
            insert(stock_reservation).values(order_id=command.order_id, sku=None, quantity=0, state="released")
        )
        return
    if found.state == "released":
        return
    await session.execute(
        update(stock_reservation).where(stock_reservation.c.order_id == command.order_id).values(state="released")
    )
    await session.execute(
        update(stock_item)
        .where(stock_item.c.sku == found.sku)
        .values(available=stock_item.c.available + found.quantity)
    )


def _reservation(order_id: UUID) -> Select[tuple[str, str, int]]:
    columns = (stock_reservation.c.state, stock_reservation.c.sku, stock_reservation.c.quantity)
    return select(*columns).where(stock_reservation.c.order_id == order_id)
