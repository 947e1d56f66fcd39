"""Sagas that wait for an approval, whole: embedded with SQLite, and RabbitMQ with PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from sqlalchemy import select

from coordinator import App, Saga, Settings, compensated, completed, sequence, starts_on, step
from coordinator.catalog.approvals import approval, approval_handlers
from coordinator.instance import Status
from coordinator.lifecycles import Actor, NotAllowedError, TransitionRefusedError
from coordinator.lifecycles.tables import lifecycle_entity
from coordinator.node import Node
from coordinator.testing import SagaRun
from events.catalog.approvals import (
    ApprovalOverdue,
    ApprovalRequested,
    ApprovalWithdrawn,
    RequestApproval,
    WithdrawApproval,
)
from events.database import transaction
from events.message import Command, Event
from handlers import Declined, handles
from handlers.tables import inbox
from tests.support.flows import START, until
from tests.support.lifecycles import actor

ZOE, MAX = actor("zoe", "manager"), actor("max", "manager")


class OrderEntered(Event):
    number: str
    clerk: str | None = "ann"


class OrderAccepted(Event):
    number: str


class OrderRefused(Event):
    number: str
    reason: str


class Charge(Command):
    number: str


manager = approval("order_approval", role="manager", approvals=2, remind_after=3600.0)


class PlaceOrder(Saga):
    """Two managers approve it, then it is paid."""

    number: str
    clerk: str | None

    @starts_on(OrderEntered)
    @classmethod
    def entered(cls, event: OrderEntered) -> "PlaceOrder":
        return cls(number=event.number, clerk=event.clerk)

    def summary(self) -> str:
        return f"order {self.number}"

    @step
    def charge(self) -> Charge:
        return Charge(number=self.number)

    flow = sequence(manager.part(key="number", requester="clerk", subject=summary, timeout=86_400), charge)

    @completed
    def accepted(self) -> OrderAccepted:
        return OrderAccepted(number=self.number)

    @compensated
    def refused(self, reason: str) -> OrderRefused:
        return OrderRefused(number=self.number, reason=reason)


class Reorder(Saga):
    """Asks for what another saga has asked for."""

    number: str
    clerk: str | None

    @starts_on(OrderEntered)
    @classmethod
    def entered(cls, event: OrderEntered) -> "Reorder":
        return cls(number=event.number, clerk=event.clerk)

    def summary(self) -> str:
        return "the same"

    flow = sequence(manager.part(key="number", requester="clerk", subject=summary))


@handles(Charge)
async def charge(command: Charge) -> None:
    if command.number.startswith("broke"):
        raise Declined("no money left")


heard: list[Event] = []


@handles(ApprovalRequested)
async def note_request(event: ApprovalRequested) -> None:
    heard.append(event)


@handles(ApprovalWithdrawn)
async def note_withdrawal(event: ApprovalWithdrawn) -> None:
    heard.append(event)


@handles(ApprovalOverdue)
async def note_reminder(event: ApprovalOverdue) -> None:
    heard.append(event)


def app_of(*sagas: type[Saga]) -> App:
    return App(
        "orders",
        sagas=sagas,
        handlers=[charge, note_request, note_withdrawal, note_reminder, *approval_handlers(manager)],
        lifecycles=[manager.lifecycle],
    )


@pytest.fixture(params=["embedded", pytest.param("servers", marks=[pytest.mark.postgres, pytest.mark.rabbitmq])])
def settings(request: pytest.FixtureRequest, namespace: str) -> Settings:
    if request.param == "embedded":
        return Settings(database_url=request.getfixturevalue("sqlite_url"))
    urls = {"broker_url": request.getfixturevalue("amqp_url"), "database_url": request.getfixturevalue("pg_url")}
    return Settings(**urls, namespace=namespace)


@pytest.fixture
async def node(settings: Settings) -> AsyncIterator[Node]:
    heard.clear()
    async with Node(app_of(PlaceOrder), settings) as running:
        yield running


async def ends(node: Node, number: str) -> tuple[Status, str | None]:
    """Wait for the end of an order; return how it has ended, and why."""

    async def is_over() -> bool:
        return any(not each.status.in_flight for each in await node.store.find(number))

    await until(is_over)
    [instance] = await node.store.find(number)
    return instance.status, instance.reason


def is_asked(node: Node, number: str) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return await node.lifecycles.store.find("order_approval", number) is not None

    return look


async def place(node: Node, number: str) -> None:
    """Place an order, and wait until it waits for its approval."""
    await node.publisher.publish(OrderEntered(number=number))
    await until(is_asked(node, number))


async def decide(node: Node, number: str, verb: str, by: Actor, comment: str = "") -> str:
    return (await node.lifecycles.act("order_approval", number, verb, by=by, comment=comment)).state


async def state_of(node: Node, number: str) -> str:
    return (await node.lifecycles.find("order_approval", number)).state


async def test_an_order_waits_until_two_managers_have_approved_it(node: Node) -> None:
    await place(node, "1")
    with pytest.raises(NotAllowedError, match="it takes somebody else than requester"):
        await decide(node, "1", "grant", actor("ann", "manager"))
    assert await decide(node, "1", "grant", ZOE) == "pending"
    assert (await node.store.find("1"))[0].status is Status.RUNNING
    assert await decide(node, "1", "grant", MAX) == "granted"
    assert await ends(node, "1") == (Status.COMPLETED, None)
    expected = ApprovalRequested(approval="order_approval", key="1", subject="order 1", requester="ann", role="manager")
    await until(lambda: asyncio.sleep(0, expected in heard))
    entity = await node.lifecycles.find("order_approval", "1")
    [asked, *_] = await node.lifecycles.store.history(entity.id)
    [saga] = await node.store.find("1")
    assert (asked.actor, asked.role, asked.kind) == (f"saga {saga.id}", "saga", "created")
    assert entity.correlation_id is not None


async def test_an_order_that_is_denied_is_undone_and_says_why(node: Node) -> None:
    await place(node, "1")
    await decide(node, "1", "deny", ZOE, "too much")
    assert await ends(node, "1") == (Status.COMPENSATED, "order_approval declined: too much")
    assert await state_of(node, "1") == "denied"


async def test_an_approval_is_withdrawn_when_a_later_step_fails(node: Node) -> None:
    await place(node, "broke")
    await decide(node, "broke", "grant", ZOE)
    await decide(node, "broke", "grant", MAX)
    assert await ends(node, "broke") == (Status.COMPENSATED, "charge declined: no money left")
    assert await state_of(node, "broke") == "withdrawn"
    with pytest.raises(TransitionRefusedError, match="possible is: nothing, this is its end"):
        await decide(node, "broke", "grant", ZOE)
    await until(lambda: asyncio.sleep(0, ApprovalWithdrawn(approval="order_approval", key="broke") in heard))


async def test_a_running_node_reminds_of_what_waits(node: Node) -> None:
    await place(node, "1")
    async with transaction(node.engine) as connection:
        await connection.execute(lifecycle_entity.update().values(due_at=START, remind_at=START))

    async def is_reminded_of() -> bool:
        return any(isinstance(each, ApprovalOverdue) and each.key == "1" for each in heard)

    await until(is_reminded_of)
    assert (await node.lifecycles.find("order_approval", "1")).reminders == 1
    assert await node.problems() == []


async def test_an_approval_that_another_saga_has_asked_for_is_declined_and_left_alone(settings: Settings) -> None:
    async with Node(app_of(PlaceOrder, Reorder), settings) as node:
        await node.publisher.publish(OrderEntered(number="1"))

        async def one_has_lost() -> bool:
            return Status.COMPENSATED in {each.status for each in await node.store.find("1")}

        await until(one_has_lost)
        [lost] = [each for each in await node.store.find("1") if each.status is Status.COMPENSATED]
        assert lost.reason is not None
        assert "somebody else has asked for the order_approval 1 already" in lost.reason
        assert await state_of(node, "1") == "pending"


async def test_what_is_asked_for_without_a_saga_is_declined(node: Node) -> None:
    await node.publisher.publish(RequestApproval(approval="order_approval", key="9", subject="x", requester="ann"))
    await node.publisher.publish(WithdrawApproval(approval="order_approval", key="9"))

    async def both_are_handled() -> bool:
        async with node.engine.connect() as connection:
            names = (await connection.execute(select(inbox.c.consumer))).scalars().all()
        return {*names} == {"request_approval", "withdraw_approval"}

    await until(both_are_handled)
    assert await node.lifecycles.store.list() == []


def test_an_order_without_a_requester_is_not_approved_by_anybody() -> None:
    """Four eyes would look for nobody."""
    run = SagaRun(PlaceOrder, OrderEntered(number="1", clerk=None))
    assert run.status == "compensated"
    assert "clerk is empty, and an approval needs it" in str(run.reason)


def test_an_approval_that_does_not_come_in_time_is_withdrawn() -> None:
    run = SagaRun(PlaceOrder, OrderEntered(number="1")).succeeds().passes(86_400)
    assert run.sent == [WithdrawApproval(approval="order_approval", key="1")]
    assert run.succeeds().status == "compensated"


def test_each_kind_of_approval_has_events_of_its_own() -> None:
    other = approval("refund_approval", role="manager")
    assert other.granted.message_type == "refund.approval.granted"
    assert manager.denied.message_type == "order.approval.denied"
    run = SagaRun(PlaceOrder, OrderEntered(number="1")).succeeds()
    for kind, key in ((manager, "2"), (other, "1")):
        with pytest.raises(AssertionError, match="no part of place_order waits for"):
            run.receives(kind.granted(key=key, decided_by="zoe", comment=""))
