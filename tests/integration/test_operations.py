"""Limits that an operator sets while handlers run: what is kept of them, and how the processes follow."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from events.codec import Readable, bundle_body
from events.database import ping, transaction
from events.errors import ConfigurationError
from events.ids import TimeOrderedIds
from handlers import Handler, Retry, handles
from handlers.operations import Operations, Setting
from handlers.retries import Waiting
from handlers.tables import handler_setting
from tests.support.flows import (
    PATIENCE,
    ChargeCard,
    Charged,
    FakeDelivery,
    RefundCard,
    Stage,
    effects,
    enveloped,
    link,
    open_stage,
    until,
)

PAUSED = {"paused": True, "retry": {}, "changed_by": "", "reason": ""}
BY = {"by": "ada", "reason": "the bank asked"}


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    url = request.getfixturevalue("pg_url" if request.param == "postgres" else "sqlite_url")
    async with open_stage(url) as opened:
        yield opened


@pytest.fixture
def operations(stage: Stage) -> Operations:
    return Operations(stage.engine, ids=TimeOrderedIds())


def charging(**policy: object) -> Handler:
    @handles(ChargeCard, name="charge_card", **policy)  # type: ignore[arg-type]
    async def charge_card(command: ChargeCard) -> Charged:
        return Charged(charge=command.order)

    return charge_card


async def test_changes_are_merged_and_each_is_kept_with_who_and_why(stage: Stage, operations: Operations) -> None:
    now = stage.clock.now()
    await operations.change("charge_card", now=now, **BY, rate=5.0)
    await operations.change("charge_card", now=now, **BY, retry={"attempts": 3, "first": 2.0})
    after = await operations.change("charge_card", now=now, by="bob", reason="", retry={"first": None}, paused=True)
    assert after.limits == {"paused": True, "rate": 5.0, "attempts": 3}
    [shown] = await operations.overview(now)
    assert shown.setting == after
    kept = await operations.changes("charge_card")
    assert [(row["changed_by"], row["change"]) for row in kept] == [
        ("bob", {"retry": {"attempts": 3}, "paused": True}),
        ("ada", {"retry": {"attempts": 3, "first": 2.0}}),
        ("ada", {"rate": 5.0}),
    ]
    assert {row["reason"] for row in kept} == {"", "the bank asked"}


async def test_operators_who_change_things_at_once_lose_nothing(stage: Stage, operations: Operations) -> None:
    now = stage.clock.now()
    for number in range(10):
        name = f"handler_{number}"
        await asyncio.gather(
            operations.change(name, now=now, **BY, paused=True),
            operations.change(name, now=now, **BY, rate=5.0),
            operations.change(name, now=now, **BY, retry={"attempts": 3}),
            operations.change(name, now=now, **BY, retry={"first": 2.0}),
        )
    shown = [each.setting.limits for each in await operations.overview(now) if each.setting]
    assert shown == [{"paused": True, "rate": 5.0, "attempts": 3, "first": 2.0}] * 10


@pytest.mark.postgres
async def test_a_reset_waits_for_a_pause_that_is_being_written(pg_url: str) -> None:
    async with open_stage(pg_url) as stage:
        now, operations = stage.clock.now(), Operations(stage.engine, ids=TimeOrderedIds())
        async with transaction(stage.engine) as connection:
            await connection.execute(handler_setting.insert().values(handler="charge_card", **PAUSED, changed_at=now))
            resetting = asyncio.create_task(operations.reset("charge_card", now=now, **BY))

            async def it_waits() -> bool:
                async with stage.engine.connect() as other:
                    waiting = await other.execute(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))
                    return bool(waiting.scalar_one())

            await until(it_waits)
        assert (await resetting).paused


async def test_a_reset_leaves_what_the_code_says_and_keeps_a_pause(stage: Stage, operations: Operations) -> None:
    now = stage.clock.now()
    await operations.change("charge_card", now=now, **BY, rate=5.0, paused=True)
    assert await operations.reset("charge_card", now=now, **BY) == Setting(
        paused=True, changed_at=now, changed_by="ada", reason="the bank asked"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 0.0},
        {"rate": -1.0},
        {"concurrency": 0},
        {"retry": {"attempts": 0}},
        {"retry": {"never": []}},
        {"retry": {"tries": 3}},
    ],
)
async def test_a_value_of_no_use_is_refused_and_changes_nothing(
    stage: Stage, operations: Operations, change: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError):
        await operations.change("charge_card", now=stage.clock.now(), **BY, **change)
    assert await operations.overview(stage.clock.now()) == []
    assert await operations.changes() == []


async def test_running_handlers_follow_within_two_seconds(stage: Stage, operations: Operations) -> None:
    group = await stage.start(charging(concurrency=4, retry=Retry(attempts=5)))
    runner = group.runners["charge_card"]
    await operations.change(
        "charge_card", now=stage.clock.now(), **BY, rate=2.0, concurrency=1, retry={"attempts": 2, "quick": 1}
    )

    async def has_followed() -> bool:
        return (runner.pace.rate, runner.slots.limit, runner.execution.retry.attempts) == (2.0, 1, 2)

    await stage.clock.pass_sleep(1.0)
    await until(has_followed)
    await operations.reset("charge_card", now=stage.clock.now(), **BY)

    async def is_reset() -> bool:
        return (runner.pace.rate, runner.slots.limit, runner.execution.retry.attempts) == (None, 4, 5)

    await stage.clock.pass_sleep(1.0)
    await until(is_reset)


@pytest.mark.postgres
@pytest.mark.postgres
async def test_handlers_that_hang_with_their_sessions_hold_up_nothing_else(pg_url: str) -> None:
    """Once they had all connections of the process: no pause was followed, no lease renewed, no other handler ran."""
    hanging = asyncio.Event()

    @handles(ChargeCard)
    async def charge_card(command: ChargeCard, session: AsyncSession) -> None:
        await session.execute(effects.insert().values(what=command.order))
        await hanging.wait()

    @handles(RefundCard)
    async def refund_card(command: RefundCard) -> None:
        assert command.order

    async with open_stage(pg_url) as stage:
        group = await stage.start(charge_card, refund_card)
        await stage.send(*(enveloped(ChargeCard(order=str(n)), saga=link()) for n in range(charge_card.concurrency)))

        async def all_have_begun() -> bool:
            return group.runners["charge_card"].slots.taken == charge_card.concurrency

        await until(all_have_begun)
        await ping(stage.engine)
        await stage.pause(group, "charge_card")
        await stage.send(enveloped(RefundCard(order="1"), saga=link()))
        assert (await stage.replies.next()).type == "succeeded"
        hanging.set()
        for _ in range(charge_card.concurrency):
            await stage.replies.next()


async def test_processes_share_a_rate_and_have_all_of_it_when_the_others_are_gone(pg_url: str) -> None:
    async with AsyncExitStack() as stack:
        two = [await stack.enter_async_context(open_stage(pg_url)) for _ in range(2)]
        groups = [await stage.start(charging(rate=10.0)) for stage in two]

        async def rate_of_first(wanted: float) -> None:
            async def is_it() -> bool:
                return groups[0].runners["charge_card"].pace.rate == wanted

            await two[0].clock.pass_sleep(1.0)
            await until(is_it)

        await rate_of_first(5.0)
        shown = await Operations(two[0].engine, ids=TimeOrderedIds()).overview(two[0].clock.now())
        assert [len(each.processes) for each in shown] == [2]
        await groups[1].stop(0)
        two[1]._groups.clear()
        await rate_of_first(10.0)


@pytest.mark.parametrize(
    "row", [{"rate": -1.0}, {"concurrency": 0}, {"retry": {"attempts": "many"}}, {"retry": {"attempts": 1, "quick": 9}}]
)
async def test_a_row_of_no_use_written_past_us_is_named_and_the_code_holds(
    stage: Stage, row: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """It must not keep the settings of other handlers from being followed."""
    caplog.set_level(logging.WARNING)
    values = {"paused": False, "retry": {}, "changed_at": stage.clock.now(), "changed_by": "", "reason": ""}
    async with transaction(stage.engine) as connection:
        await connection.execute(handler_setting.insert().values(**{**values, "handler": "charge_card", **row}))
    group = await stage.start(charging(rate=7.0, retry=Retry(attempts=3)))
    runner = group.runners["charge_card"]
    assert (runner.pace.rate, runner.execution.retry.attempts) == (7.0, 3)
    assert any(
        getattr(record, "action", "") == "handlers.bad_setting" and "charge_card" in record.getMessage()
        for record in caplog.records
    )


async def test_a_pause_holds_messages_that_wait_for_their_key_and_they_run_when_it_ends(stage: Stage) -> None:
    begun: list[str] = []
    has_begun, go_on = asyncio.Event(), asyncio.Event()

    @handles(ChargeCard, name="charge_card", key=lambda _: "one")
    async def charge_card(command: ChargeCard) -> Charged:
        begun.append(command.order)
        has_begun.set()
        await go_on.wait()
        return Charged(charge=command.order)

    group = await stage.start(charge_card)
    runner = group.runners["charge_card"]
    await stage.send(*(enveloped(ChargeCard(order=str(number)), saga=link()) for number in range(5)))

    async def all_wait() -> bool:
        return len(runner._tasks) == 5

    async def none_waits() -> bool:
        return not runner._tasks

    async with asyncio.timeout(PATIENCE):
        await has_begun.wait()
    await until(all_wait)
    await stage.pause(group, "charge_card")
    go_on.set()
    await stage.replies.next()
    await until(none_waits)
    assert len(begun) == 1
    await stage.pause(group, "charge_card", paused=False)
    for _ in range(4):
        await stage.replies.next()
    assert sorted(begun) == ["0", "1", "2", "3", "4"]


async def test_a_suspect_that_waits_for_its_key_is_held_by_a_pause_too(stage: Stage) -> None:
    """It is tried past all others, but not past an operator."""
    begun: list[str] = []
    has_begun, go_on = asyncio.Event(), asyncio.Event()

    @handles(ChargeCard, name="charge_card", key=lambda _: "one")
    async def charge_card(command: ChargeCard) -> Charged:
        begun.append(command.order)
        has_begun.set()
        await go_on.wait()
        return Charged(charge=command.order)

    group = await stage.start(charge_card)
    runner = group.runners["charge_card"]
    await stage.send(enveloped(ChargeCard(order="first"), saga=link()))
    async with asyncio.timeout(PATIENCE):
        await has_begun.wait()
    suspect = enveloped(ChargeCard(order="suspect"), saga=link())
    now = stage.retries.clock.now()
    delivery = FakeDelivery(bundle_body([suspect.encode()]))
    [item] = runner._intake.read(delivery)
    assert isinstance(item.part, Readable)
    row = Waiting.of(item, item.part, id=stage.ids.new(), consumer="charge_card", now=now)
    async with transaction(stage.engine) as connection:
        await stage.retries.add(connection, [row])
    [claimed] = await stage.retries.claim("charge_card", 1)
    trying = asyncio.create_task(runner.run_at_once(claimed))

    async def both_are_there() -> bool:
        return len(runner._tasks) == 2

    await until(both_are_there)
    await stage.pause(group, "charge_card")
    go_on.set()
    await trying
    assert begun == ["first"]
    [left] = await stage.waiting()
    assert (left.attempts, left.begun_at) == (0, None)
    await stage.pause(group, "charge_card", paused=False)
    stage.clock.advance(1)  # it looks for what waits
    for _ in range(2):
        await stage.replies.next()
    assert begun == ["first", "suspect"]


async def test_messages_of_one_key_run_one_at_a_time_and_others_beside_them(stage: Stage) -> None:
    running: list[str] = []
    most: dict[str, int] = {}
    begun: asyncio.Queue[str] = asyncio.Queue()
    go_on = asyncio.Event()

    @handles(ChargeCard, name="charge_card", key=lambda command: command.order[0], concurrency=4)
    async def charge_card(command: ChargeCard) -> Charged:
        customer = command.order[0]
        running.append(customer)
        most[customer] = max(most.get(customer, 0), running.count(customer))
        begun.put_nowait(command.order)
        await go_on.wait()
        running.remove(customer)
        return Charged(charge=command.order)

    await stage.start(charge_card)
    await stage.send(*(enveloped(ChargeCard(order=order), saga=link()) for order in ("a1", "a2", "a3", "b1", "b2")))
    async with asyncio.timeout(PATIENCE):
        assert {(await begun.get())[0], (await begun.get())[0]} == {"a", "b"}
    go_on.set()
    assert {(await stage.replies.next()).type for _ in range(5)} == {"charged"}
    assert most == {"a": 1, "b": 1}
