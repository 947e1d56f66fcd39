"""The order of a customer."""

from typing import Self
from uuid import UUID

from coordinator.definition import Saga
from coordinator.flow import sequence
from coordinator.steps import compensated, completed, starts_on, step
from events.catalog.orders import (
    CancelShipment,
    OrderCancelled,
    OrderCompleted,
    OrderPlaced,
    OrderShipped,
    ReleaseStock,
    ReserveStock,
    ShipOrder,
)
from events.catalog.payments import ChargeCard, PaymentCaptured, RefundCard
from events.catalog.values import Money


class PlaceOrder(Saga, version=1):
    """Reserve stock, charge the card, ship. Undo in reverse if a step fails."""

    order_id: UUID
    sku: str
    quantity: int
    total: Money
    card: str
    address: str
    charge_id: str | None = None
    shipment_id: str | None = None

    @starts_on(OrderPlaced)
    @classmethod
    def placed(cls, event: OrderPlaced) -> Self:
        """Begin with what the customer has ordered."""
        return cls(
            order_id=event.order_id,
            sku=event.sku,
            quantity=event.quantity,
            total=event.total,
            card=event.card,
            address=event.address,
        )

    @step(timeout=60)
    def reserve(self) -> ReserveStock:
        """Set the goods aside."""
        return ReserveStock(order_id=self.order_id, sku=self.sku, quantity=self.quantity)

    @reserve.compensation
    def release(self) -> ReleaseStock:
        """Put them back."""
        return ReleaseStock(order_id=self.order_id)

    @step(timeout=60)
    def charge(self) -> ChargeCard:
        """Take the money."""
        return ChargeCard(order_id=self.order_id, amount=self.total, card=self.card)

    @charge.succeeded
    def charged(self, outcome: PaymentCaptured) -> None:
        """Remember the charge."""
        self.charge_id = outcome.charge_id

    @charge.compensation
    def refund(self) -> RefundCard:
        """Give the money back."""
        return RefundCard(order_id=self.order_id)

    @step(timeout=60)
    def ship(self) -> ShipOrder:
        """Send the goods."""
        return ShipOrder(order_id=self.order_id, address=self.address)

    @ship.succeeded
    def shipped(self, outcome: OrderShipped) -> None:
        """Remember the shipment."""
        self.shipment_id = outcome.shipment_id

    @ship.compensation
    def cancel(self) -> CancelShipment:
        """Stop a shipment of which nobody knows whether it was ordered."""
        return CancelShipment(order_id=self.order_id)

    flow = sequence(reserve, charge, ship)

    @completed
    def announce(self) -> OrderCompleted:
        """Tell everybody that the order is on its way."""
        return OrderCompleted(order_id=self.order_id)

    @compensated
    def withdraw(self, reason: str) -> OrderCancelled:
        """Tell everybody that the order was cancelled, and why."""
        return OrderCancelled(order_id=self.order_id, reason=reason[:500])
