"""An order: the event that starts it, stock and shipping, and how it ends."""

from typing import Annotated
from uuid import UUID

from pydantic import Field, StringConstraints

from events.catalog.values import Money, Name, Reason, Sku
from events.message import Command, Event, Reply

Address = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]
Quantity = Annotated[int, Field(ge=1, le=10_000)]


class OrderPlaced(Event):
    """A customer has ordered."""

    order_id: UUID
    customer: Name
    sku: Sku
    quantity: Quantity
    total: Money
    card: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    address: Address


class OrderCompleted(Event):
    """The order is paid and on its way."""

    order_id: UUID


class OrderCancelled(Event):
    """The order was cancelled, and what had been done for it was undone."""

    order_id: UUID
    reason: Reason


class ReserveStock(Command):
    """Set goods aside for an order."""

    order_id: UUID
    sku: Sku
    quantity: Quantity


class ReleaseStock(Command):
    """Put the goods of an order back."""

    order_id: UUID


class StockShort(Reply):
    """There are not enough goods."""

    sku: Sku
    reason: Reason


class ShipOrder(Command):
    """Send the goods of an order."""

    order_id: UUID
    address: Address


class CancelShipment(Command):
    """Stop a shipment that may or may not have been ordered."""

    order_id: UUID


class OrderShipped(Event):
    """The goods were handed to a carrier."""

    order_id: UUID
    shipment_id: str


class ShipmentRefused(Event):
    """The carrier does not take the goods."""

    order_id: UUID
    reason: Reason
