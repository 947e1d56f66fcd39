"""An order above a limit waits for a manager.

python examples/large_order.py       places three orders: a small one, one that is approved, one that is not
pytest examples/large_order.py       runs the unit tests
"""

import asyncio
import tempfile
from pathlib import Path

from coordinator import App, Saga, compensated, completed, sequence, starts_on, step, when
from coordinator.catalog.approvals import approval, approval_handlers
from coordinator.lifecycles import Actor
from coordinator.node import Node
from coordinator.settings import Settings
from coordinator.testing import SagaRun
from events import Command, Event
from events.catalog.approvals import RequestApproval, WithdrawApproval
from handlers import handles

LIMIT, DAY = 1000, 86_400.0

# What is said


class OrderEntered(Event):
    number: str
    clerk: str
    amount: int


class OrderAccepted(Event):
    number: str


class OrderRefused(Event):
    number: str
    reason: str


class SetAside(Command):
    number: str


class PutBack(Command):
    number: str


# Who acts


@handles(SetAside)
async def set_aside(command: SetAside) -> None:
    """Set the goods aside."""


@handles(PutBack)
async def put_back(command: PutBack) -> None:
    """Put them back."""


# Who keeps track. The clerk's own approval does not count; after three days the director may decide, too.

manager = approval(
    "order_approval", role="manager", remind_after=DAY, every=DAY, escalate_after=3 * DAY, escalate_to="director"
)


class PlaceOrder(Saga):
    """Set the goods aside; above the limit, wait for a manager."""

    number: str
    clerk: str
    amount: int

    @starts_on(OrderEntered)
    @classmethod
    def entered(cls, event: OrderEntered) -> "PlaceOrder":
        return cls(number=event.number, clerk=event.clerk, amount=event.amount)

    @step
    def reserve(self) -> SetAside:
        return SetAside(number=self.number)

    @reserve.compensation
    def release(self) -> PutBack:
        return PutBack(number=self.number)

    def is_large(self) -> bool:
        return self.amount > LIMIT

    def summary(self) -> str:
        return f"order {self.number} over {self.amount}"

    flow = sequence(
        reserve, when(is_large, manager.part(key="number", requester="clerk", subject=summary, timeout=7 * DAY))
    )

    @completed
    def accepted(self) -> OrderAccepted:
        return OrderAccepted(number=self.number)

    @compensated
    def refused(self, reason: str) -> OrderRefused:
        return OrderRefused(number=self.number, reason=reason)


app = App(
    "orders",
    sagas=[PlaceOrder],
    handlers=[set_aside, put_back, *approval_handlers(manager)],
    lifecycles=[manager.lifecycle],
)


def waiting() -> SagaRun:
    """An order above the limit that waits for its manager."""
    return SagaRun(PlaceOrder, OrderEntered(number="1", clerk="ann", amount=5000)).succeeds().succeeds()


def test_a_small_order_asks_nobody() -> None:
    run = SagaRun(PlaceOrder, OrderEntered(number="1", clerk="ann", amount=LIMIT)).succeeds()
    assert run.published == [OrderAccepted(number="1")]


def test_a_large_order_asks_and_waits_for_the_manager() -> None:
    run = SagaRun(PlaceOrder, OrderEntered(number="1", clerk="ann", amount=5000)).succeeds()
    asked = RequestApproval(approval="order_approval", key="1", subject="order 1 over 5000", requester="ann")
    assert run.sent == [asked]
    run.succeeds()
    assert (run.sent, run.status) == ([], "running")
    run.receives(manager.granted(key="1", decided_by="zoe", comment=""))
    assert run.published == [OrderAccepted(number="1")]


def test_what_was_not_decided_in_a_week_is_withdrawn_and_released() -> None:
    run = waiting().passes(7 * DAY)
    assert run.sent == [WithdrawApproval(approval="order_approval", key="1")]
    assert run.succeeds().sent == [PutBack(number="1")]
    assert run.succeeds().status == "compensated"


async def place(folder: Path) -> None:
    async with Node(app, Settings(database_url=f"sqlite:///{folder / 'orders.db'}")) as node:
        for number, amount in (("1", 200), ("2", 5000), ("3", 90_000)):
            await node.publisher.publish(OrderEntered(number=number, clerk="ann", amount=amount))
        zoe = Actor("zoe", {"manager"})
        while True:
            asked = await node.lifecycles.waiting_for(zoe)
            if len(asked) == 2:  # noqa: PLR2004  # the two large ones
                break
            await asyncio.sleep(0.05)
        await node.lifecycles.act("order_approval", "2", "grant", by=zoe)
        await node.lifecycles.act("order_approval", "3", "deny", by=zoe, comment="too much")
        while True:
            orders = [order for number in "123" for order in await node.store.find(number)]
            if not any(order.status.in_flight for order in orders):
                break
            await asyncio.sleep(0.05)
        for order in orders:
            print(order.key, order.status, order.reason or "")  # noqa: T201  # it is a program


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place_of_files:
        asyncio.run(place(Path(place_of_files)))
