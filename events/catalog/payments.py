"""Payments: charges and refunds."""

from typing import Annotated
from uuid import UUID

from pydantic import StringConstraints

from events.catalog.values import Money, Reason
from events.message import Command, Event


class ChargeCard(Command):
    """Take the money for an order."""

    order_id: UUID
    amount: Money
    card: Annotated[str, StringConstraints(min_length=1, max_length=64)]


class RefundCard(Command):
    """Give the money for an order back, if any was taken."""

    order_id: UUID


class PaymentCaptured(Event):
    """The money was taken."""

    order_id: UUID
    charge_id: str
    amount: Money


class PaymentFailed(Event):
    """The bank said no."""

    order_id: UUID
    reason: Reason


class PaymentRefunded(Event):
    """The money was given back."""

    order_id: UUID
    refund_id: str
