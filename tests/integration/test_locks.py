"""One running saga holds a business key, others wait in line for it: on both databases, in several processes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any, Self
from uuid import UUID

import pytest

from coordinator import Query, Saga, Status, Verb, awaits, sequence, starts_on, step
from coordinator.lines import Lines, Place
from coordinator.operator import Operator
from coordinator.tables import saga_lock
from coordinator.verification import Verification
from events import Command, Event
from events.database import transaction
from events.envelope import Direction, Envelope, Result
from events.failpoints import armed
from events.message import Failed
from tests.support.engines import Coordinator, Hold, World, envelope_of, reply
from tests.support.flows import PATIENCE, count_rows, open_store, until


class PaymentWanted(Event):
    payment: str
    account: str


class ClosureWanted(Event):
    closure: str
    account: str


class Debit(Command):
    payment: str
    text: str = ""


class Credit(Command):
    payment: str


class Close(Command):
    closure: str


class Payment(Saga, lock="account", deadline=100):
    payment: str
    account: str

    @starts_on(PaymentWanted)
    @classmethod
    def wanted(cls, event: PaymentWanted) -> Self:
        return cls(payment=event.payment, account=event.account)

    @step(timeout=50)
    def debit(self) -> Command:
        if self.payment == "broken":
            raise RuntimeError("it cannot be asked for")
        return Debit(payment=self.payment, text="x" * 5000 if self.payment == "large" else "")

    @debit.compensation(resends=0)
    def credit(self) -> Credit:
        return Credit(payment=self.payment)

    flow = sequence(debit)


class Closure(Saga, lock="account"):
    closure: str
    account: str

    @starts_on(ClosureWanted)
    @classmethod
    def wanted(cls, event: ClosureWanted) -> Self:
        return cls(closure=event.closure, account=event.account)

    @step
    def close(self) -> Close:
        return Close(closure=self.closure)

    flow = sequence(close)


class Confirmed(Event):
    order: str


class Confirmation(Saga, lock="account"):
    """Ends with an event."""

    closure: str
    account: str

    @starts_on(ClosureWanted)
    @classmethod
    def wanted(cls, event: ClosureWanted) -> Self:
        return cls(closure=event.closure, account=event.account)

    @awaits(Confirmed, by={"order": "closure"})
    def confirmed(self, event: Confirmed) -> None: ...

    flow = sequence(confirmed)


def pay(payment: str, account: str = "a-1") -> Envelope:
    return envelope_of(PaymentWanted(payment=payment, account=account))


def close(closure: str, account: str = "a-1") -> Envelope:
    return envelope_of(ClosureWanted(closure=closure, account=account))


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with open_store(database_url) as engine, AsyncExitStack() as stack:
        yield World(database_url, engine, stack)


@pytest.fixture
async def shared(pg_url: str) -> AsyncIterator[World]:
    async with open_store(pg_url) as engine, AsyncExitStack() as stack:
        yield World(pg_url, engine, stack)


@pytest.fixture
async def coordinator(world: World) -> Coordinator:
    return await world.coordinator(Payment, Closure)


def operator_of(coordinator: Coordinator) -> Operator:
    return Operator(coordinator.engine, coordinator.store, coordinator.clock)


ABOUT: dict[str, Any] = {"by": "ada", "why": "a test"}


async def statuses(world: World, *keys: str) -> list[str]:
    return [(await world.instance(key)).status.value for key in keys]


async def finish(world: World, coordinator: Coordinator, key: str, step_name: str = "debit") -> None:
    await coordinator.take(reply((await world.instance(key)).id, step_name))


async def test_one_saga_holds_a_key_and_the_next_begins_when_it_has_ended(
    world: World, coordinator: Coordinator
) -> None:
    await coordinator.take(pay("p-1"))
    await coordinator.take(close("c-1"), pay("p-2"), pay("other", "a-2"))
    assert await statuses(world, "p-1", "c-1", "p-2", "other") == ["running", "waiting", "waiting", "running"]
    assert [each.type for each in await world.sent()].count("close") == 0
    await finish(world, coordinator, "p-1")
    assert await statuses(world, "p-1", "c-1", "p-2") == ["completed", "running", "waiting"]
    await finish(world, coordinator, "c-1", "close")
    await finish(world, coordinator, "p-2")
    assert await statuses(world, "p-1", "c-1", "p-2") == ["completed", "completed", "completed"]
    assert await world.history("p-2") == ["started", "granted", "reply"]
    assert len(await world.sent("debit")) == 3
    assert await count_rows(world.engine, saga_lock) == 1, "that of the other account"


async def test_the_next_begins_in_the_commit_in_which_the_one_before_ends(
    world: World, coordinator: Coordinator
) -> None:
    """A crash costs neither: they have both happened, or none of them."""
    await coordinator.take(pay("p-1"), pay("p-2"))
    hold = Hold()
    with armed("engine.before_commit", hold):
        delivery = coordinator.give(reply((await world.instance("p-1")).id, "debit"))
        await hold.reached()
        await coordinator.engine.stop()
    assert delivery.acks == 0
    other = await world.coordinator(Payment, Closure)
    assert await statuses(world, "p-1", "p-2") == ["running", "waiting"]
    await finish(world, other, "p-1")
    assert await statuses(world, "p-1", "p-2") == ["completed", "running"]


async def test_the_line_keeps_the_order_of_arrival(world: World, coordinator: Coordinator) -> None:
    payments = [f"p-{number}" for number in range(20)]
    await coordinator.take(*map(pay, payments[:10]))
    for payment in payments[10:]:
        await coordinator.take(pay(payment))
    lines = Lines(coordinator.store)
    for number, payment in enumerate(payments):
        last = (await world.instance(payments[-1])).id
        assert await lines.place(last) == Place("account=a-1", 19 - number)
        assert await statuses(world, payment) == ["running"]
        assert await statuses(world, *payments[number + 1 :]) == ["waiting"] * (19 - number)
        await finish(world, coordinator, payment)
    assert await count_rows(world.engine, saga_lock) == 0


async def test_it_is_held_until_all_is_undone_and_while_a_person_must_look(
    world: World, coordinator: Coordinator
) -> None:
    await coordinator.take(pay("p-1"), pay("p-2"))
    saga = (await world.instance("p-1")).id
    failed = Failed(code="failed", reason="no", attempts=1)
    await coordinator.take(reply(saga, "debit", failed, Result.FAILED))
    assert await statuses(world, "p-1", "p-2") == ["compensating", "waiting"]
    coordinator.clock.advance(1e6)
    assert await coordinator.engine.deadlines.fire() == 1
    assert await statuses(world, "p-1", "p-2") == ["needs_attention", "waiting"]
    assert await coordinator.engine.deadlines.mend_lines() == 0
    await operator_of(coordinator).act("p-1", Verb.SKIP, **ABOUT, step="debit")
    assert await statuses(world, "p-1", "p-2") == ["compensated", "running"]


async def test_a_deadline_that_ends_the_holder_starts_the_next(world: World, coordinator: Coordinator) -> None:
    await coordinator.take(close("c-1"), pay("p-2"))
    operator = operator_of(coordinator)
    until = coordinator.store.clock.now() + timedelta(seconds=5)
    await operator.act("c-1", Verb.MOVE_DEADLINE, **ABOUT, until=until)
    coordinator.clock.advance(5)
    assert await coordinator.engine.deadlines.fire() == 1
    await operator.act("c-1", Verb.RETRY, **ABOUT, step="close")
    await coordinator.take(reply((await world.instance("c-1")).id, "close"))
    assert await statuses(world, "c-1", "p-2") == ["compensated", "running"]


async def test_a_waiting_saga_is_cancelled_and_leaves_the_line(world: World, coordinator: Coordinator) -> None:
    await coordinator.take(pay("p-1"), pay("p-2"), pay("p-3"))
    cancelled = await operator_of(coordinator).act("p-2", Verb.CANCEL, **ABOUT)
    assert cancelled.status is Status.COMPENSATED
    assert await statuses(world, "p-1", "p-3") == ["running", "waiting"]
    await finish(world, coordinator, "p-1")
    assert await statuses(world, "p-2", "p-3") == ["compensated", "running"]
    assert len(await world.sent("debit")) == 2


async def test_all_that_wait_are_cancelled_at_once(world: World, coordinator: Coordinator) -> None:
    await coordinator.take(*(pay(f"p-{number}") for number in range(5)))
    coordinator.clock.advance(0.001)
    acts = operator_of(coordinator).act_on(Query(statuses=(Status.WAITING,)), Verb.CANCEL, **ABOUT)
    assert [outcome.refused async for outcome in acts] == [None] * 4
    assert await statuses(world, *(f"p-{number}" for number in range(5))) == ["running", *["compensated"] * 4]
    assert await count_rows(world.engine, saga_lock) == 1


async def test_the_deadline_counts_from_the_turn_unless_an_operator_sets_one(
    world: World, coordinator: Coordinator
) -> None:
    await coordinator.take(close("c-1"), pay("p-1"), pay("p-2"), pay("p-3"))
    assert (await world.instance("p-1")).due_at is None
    until = coordinator.store.clock.now() + timedelta(seconds=40)
    await operator_of(coordinator).act("p-2", Verb.MOVE_DEADLINE, **ABOUT, until=until)
    coordinator.clock.advance(39)
    await finish(world, coordinator, "c-1", "close")
    granted = await world.instance("p-1")
    assert granted.deadline == granted.updated_at + timedelta(seconds=100)  # type: ignore[operator]
    coordinator.clock.advance(1.5)
    assert await coordinator.engine.deadlines.fire() == 1
    assert await statuses(world, "p-1", "p-2", "p-3") == ["running", "compensated", "waiting"]
    assert (await world.instance("p-2")).steps == {}


async def test_an_early_event_that_ends_the_holder_starts_the_next(world: World) -> None:
    coordinator = await world.coordinator(Confirmation)
    await coordinator.take(envelope_of(Confirmed(order="c-1")))
    await coordinator.take(close("c-1"), close("c-2"))

    async def has_ended() -> bool:
        return await statuses(world, "c-1") == ["completed"]

    await until(has_ended)
    assert await statuses(world, "c-2") == ["running"]
    assert await count_rows(world.engine, saga_lock) == 1


async def test_an_event_for_one_that_waits_for_its_turn_is_kept_for_it(world: World) -> None:
    coordinator = await world.coordinator(Confirmation)
    await coordinator.take(close("c-1"), close("c-2"))
    await coordinator.take(envelope_of(Confirmed(order="c-2")))
    await coordinator.take(envelope_of(Confirmed(order="c-1")))

    async def have_ended() -> bool:
        return await statuses(world, "c-1", "c-2") == ["completed", "completed"]

    await until(have_ended)
    assert await world.history("c-2") == ["started", "granted", "event"]
    assert await count_rows(world.engine, saga_lock) == 0


async def test_duplicate_starts_stand_in_line_once(world: World, coordinator: Coordinator) -> None:
    first = pay("p-1")
    coordinator.give(first, first, pay("p-2"), pay("p-2"))
    coordinator.give(first)
    await coordinator.settled()
    await coordinator.take(first, pay("p-2"))
    assert await count_rows(world.engine, saga_lock) == 2
    await finish(world, coordinator, "p-1")
    assert await statuses(world, "p-1", "p-2") == ["completed", "running"]
    await finish(world, coordinator, "p-2")
    assert await count_rows(world.engine, saga_lock) == 0


async def test_one_that_ends_as_soon_as_it_begins_lets_the_next_go_on(world: World, coordinator: Coordinator) -> None:
    await coordinator.take(pay("p-1"), pay("broken"), pay("p-2"))
    await finish(world, coordinator, "p-1")
    assert await statuses(world, "p-1", "broken", "p-2") == ["completed", "compensated", "running"]


async def test_one_whose_begin_cannot_be_stored_does_not_cost_the_end_of_the_one_before(
    world: World, coordinator: Coordinator
) -> None:
    await coordinator.take(pay("p-1"), pay("large"), pay("p-2"))
    await finish(world, coordinator, "p-1")
    assert await statuses(world, "p-1", "large") == ["completed", "waiting"]
    assert await coordinator.engine.deadlines.mend_lines() == 1
    assert await statuses(world, "large", "p-2") == ["needs_attention", "waiting"]
    assert await world.dead() == {}
    await operator_of(coordinator).act("large", Verb.COMPENSATE, **ABOUT)
    assert await statuses(world, "large", "p-2") == ["compensated", "running"]


async def test_a_start_that_does_not_know_its_key_is_a_dead_letter(world: World, coordinator: Coordinator) -> None:
    await coordinator.take(pay("p-1", ""), pay("p-2"))
    assert list((await world.dead()).values()) == ["failed"]
    assert await statuses(world, "p-2") == ["running"]


async def test_a_check_of_the_database_knows_lines(world: World, coordinator: Coordinator) -> None:
    await coordinator.take(pay("p-1"), pay("p-2"), pay("p-3"), pay("p-4"))
    await finish(world, coordinator, "p-1")
    await operator_of(coordinator).act("p-3", Verb.CANCEL, **ABOUT)

    async def wrong() -> list[tuple[UUID, str]]:
        found = Verification(world.engine, coordinator.clock).findings()
        return [(each.saga_id, each.detail) async for each in found]

    assert await wrong() == []
    saga = (await world.instance("p-4")).id
    async with transaction(world.engine) as connection:
        await connection.execute(saga_lock.delete().where(saga_lock.c.saga_id == saga))
    assert await wrong() == [(saga, "it is waiting, which is not its turn in the line for its business key")]
    running = (await world.instance("p-2")).id
    async with transaction(world.engine) as connection:
        await connection.execute(saga_lock.insert().values(position=1, key="account=a-1", saga_id=saga))
    assert await wrong() == [(running, "it is running, which is not its turn in the line for its business key")]


async def test_a_line_that_nobody_moves_is_mended(world: World, coordinator: Coordinator) -> None:
    """A process without the next one's version has ended the one before, or a row was removed by hand."""
    await coordinator.take(pay("p-1"), close("c-1"))
    await coordinator.engine.stop()
    old = await world.coordinator(Payment)
    await finish(world, old, "p-1")
    assert await statuses(world, "p-1", "c-1") == ["completed", "waiting"]
    assert await old.engine.deadlines.mend_lines() == 0
    new = await world.coordinator(Payment, Closure)
    await new.engine.deadlines.mend_lines()
    assert await statuses(world, "c-1") == ["running"]
    assert await new.engine.deadlines.mend_lines() == 0
    saga = (await world.instance("p-1")).id
    async with transaction(world.engine) as connection:
        await connection.execute(saga_lock.delete())
        await connection.execute(saga_lock.insert().values(key="account=a-1", saga_id=saga))
    assert await new.engine.deadlines.mend_lines() == 1
    assert await count_rows(world.engine, saga_lock) == 0


async def test_processes_that_start_and_end_at_once_never_let_two_hold_a_key(shared: World) -> None:
    """Starts, replies and cancels race over one line in three processes: each saga runs alone, and all of them end."""
    coordinators = [await shared.coordinator(Payment, apart=True) for _ in range(3)]
    payments = [f"p-{number:02}" for number in range(30)]
    for number, payment in enumerate(payments):
        coordinators[number % 3].give(pay(payment))
    for coordinator in coordinators:
        await coordinator.settled()
    store = coordinators[0].store
    assert await count_rows(shared.engine, saga_lock) == 30
    alive = Query(statuses=(Status.WAITING, Status.RUNNING, Status.COMPENSATING))
    while left := await store.list(alive, limit=100):
        running = [each for each in left if each.status is not Status.WAITING]
        waiting = [each for each in left if each.status is Status.WAITING]
        assert len(running) <= 1
        if not running:  # the next one was being looked at when the one before ended
            assert await coordinators[1].engine.deadlines.mend_lines() == 1
            continue
        undone = reply(running[0].id, "debit", direction=Direction.UNDO)  # late, unless it was cancelled
        finishing = [coordinator.take(reply(running[0].id, "debit"), undone) for coordinator in coordinators]
        acts = [operator_of(coordinators[0]).act(each.id, Verb.CANCEL, **ABOUT) for each in waiting[:1]]
        async with asyncio.timeout(PATIENCE):
            results = await asyncio.gather(*finishing, *acts, return_exceptions=True)
        assert all(type(each).__name__ in ("NoneType", "Instance", "NotPossibleError") for each in results), results
    assert await count_rows(shared.engine, saga_lock) == 0
    counts = await store.count_by_status()
    assert sum(counts.values()) == 30
    assert {status for _, status in counts} <= {Status.COMPLETED, Status.COMPENSATED}
