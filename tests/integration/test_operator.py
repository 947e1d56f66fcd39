"""Operators act on many sagas at once, and see what is due: on both databases."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import pytest

from coordinator import Query, Resolution, Status, Verb
from coordinator.acts import NotPossibleError
from coordinator.bulk_acts import BulkAct, Outcome
from coordinator.operator import Operator
from coordinator.timers import find_timers
from events.errors import ConfigurationError
from events.failpoints import armed
from tests.integration.test_engine import Odd, Stubborn
from tests.support.engines import Coordinator, World, reply, wanted
from tests.support.flows import open_store

TRIPS = Query(saga="stubborn")
ABOUT: dict[str, Any] = {"by": "ada", "why": "the hotel has burnt down"}


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with open_store(database_url) as engine, AsyncExitStack() as stack:
        yield World(database_url, engine, stack)


@pytest.fixture
async def coordinator(world: World) -> Coordinator:
    return await world.coordinator(Stubborn)


@pytest.fixture
def operator(coordinator: Coordinator) -> Operator:
    return Operator(coordinator.engine, coordinator.store, coordinator.clock)


async def run(act: BulkAct) -> list[Outcome]:
    return [outcome async for outcome in act]


def keys(outcomes: list[Outcome]) -> list[str]:
    return sorted(each.after.key for each in outcomes if each.refused is None)


async def start(coordinator: Coordinator, count: int) -> None:
    await coordinator.take(*(wanted(f"t-{number:03}") for number in range(count)))
    coordinator.clock.advance(0.001)  # what is started in the very moment in which an act begins is not meant


async def test_all_sagas_that_a_query_means_are_acted_on_and_no_others(
    world: World, coordinator: Coordinator, operator: Operator
) -> None:
    await start(coordinator, 250)
    done = await run(operator.act_on(Query(saga="stubborn", where=(("trip", "t-007"),)), Verb.CANCEL, **ABOUT))
    assert keys(done) == ["t-007"]
    assert done[0].after == await world.instance("t-007")
    outcomes = await run(operator.act_on(TRIPS, Verb.CANCEL, **ABOUT))
    assert len(keys(outcomes)) == 249
    [refused] = [each for each in outcomes if each.refused]
    assert (refused.before, str(refused.refused)) == (
        done[0].after,
        "only a running saga can be cancelled; this one is compensating",
    )
    assert len(await coordinator.store.list(Query(statuses=(Status.COMPENSATING,)), limit=1000)) == 250
    assert await world.history("t-249") == await world.history("t-007") == ["started", "cancel"]


async def test_a_dry_run_says_what_would_be_done_and_changes_nothing(
    world: World, coordinator: Coordinator, operator: Operator
) -> None:
    await start(coordinator, 3)
    await operator.act("t-001", Verb.CANCEL, **ABOUT)
    before, sent = await coordinator.store.list(), len(await world.sent())
    outcomes = await run(operator.act_on(TRIPS, Verb.CANCEL, **ABOUT, dry_run=True))
    assert sorted((each.after.key, each.after.status.value, each.refused is None) for each in outcomes) == [
        ("t-000", "compensating", True),
        ("t-001", "compensating", False),
        ("t-002", "compensating", True),
    ]
    assert await coordinator.store.list() == before
    assert len(await world.sent()) == sent


async def test_a_saga_that_moves_on_meanwhile_is_refused_and_left_alone(
    world: World, coordinator: Coordinator, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start(coordinator, 3)
    page = coordinator.store.page

    async def slow(*arguments: Any, **options: Any) -> Any:
        """Between what the operator sees and what he does, an answer arrives."""
        found = await page(*arguments, **options)
        if found:
            await coordinator.take(reply((await world.instance("t-001")).id, "hotel"))
        return found

    monkeypatch.setattr(coordinator.store, "page", slow)
    outcomes = await run(operator.act_on(TRIPS, Verb.CANCEL, **ABOUT))
    assert keys(outcomes) == ["t-000", "t-002"]
    [refused] = [str(each.refused) for each in outcomes if each.refused]
    assert "it is at revision 2, not 1; look at it again" in refused
    assert await world.history("t-001") == ["started", "reply"]


async def test_two_operators_at_once_act_on_each_saga_once(
    world: World, coordinator: Coordinator, operator: Operator
) -> None:
    await start(coordinator, 150)
    both = await asyncio.gather(*(run(operator.act_on(TRIPS, Verb.CANCEL, **ABOUT)) for _ in range(2)))
    assert sorted(keys(both[0]) + keys(both[1])) == sorted(f"t-{number:03}" for number in range(150))
    assert {str(each.refused)[:22] for one in both for each in one if each.refused} <= {
        "the saga has moved on:",
        "only a running saga ca",
    }
    for number in range(150):
        assert await world.history(f"t-{number:03}") == ["started", "cancel"]


async def test_the_pace_is_kept_and_who_stops_early_knows_what_was_done(
    coordinator: Coordinator, operator: Operator
) -> None:
    await start(coordinator, 5)
    act = operator.act_on(TRIPS, Verb.CANCEL, **ABOUT, rate=0.01)
    outcomes, first = act.__aiter__(), []
    first.append(await anext(outcomes))
    following = asyncio.ensure_future(anext(outcomes))
    await coordinator.clock.asleep(0.5)
    coordinator.clock.advance(99)
    await coordinator.clock.asleep(0.5)
    assert not following.done(), "it is due 100 s after the first"
    coordinator.clock.advance(1)
    first.append(await following)
    last = asyncio.ensure_future(anext(outcomes))
    await coordinator.clock.asleep(0.5)
    act.stop()
    await coordinator.clock.pass_sleep(0.5)
    with pytest.raises(StopAsyncIteration):
        await last
    assert act.stopped
    running = Query(statuses=(Status.RUNNING,))
    left = sorted({f"t-{number:03}" for number in range(5)} - set(keys(first)))
    assert len(left) == 3
    assert sorted(each.key for each in await coordinator.store.list(running)) == left
    assert keys(await run(operator.act_on(running, Verb.CANCEL, **ABOUT))) == left, "it goes on when it is run again"


async def test_one_saga_whose_consequences_cannot_be_stored_is_refused_alone(world: World) -> None:
    coordinator = await world.coordinator(Odd)
    operator = Operator(coordinator.engine, coordinator.store, coordinator.clock)
    await coordinator.take(wanted("good"), wanted("large undo"), wanted("fine"))
    coordinator.clock.advance(0.001)
    outcomes = await run(
        operator.act_on(Query(saga="odd"), Verb.RESOLVE, **ABOUT, step="hotel", resolution=Resolution.FAILED)
    )
    assert keys(outcomes) == ["fine", "good"]
    assert [type(each.refused).__name__ for each in outcomes if each.refused] == ["TooLargeError"]
    assert (await world.instance("large undo")).status is Status.RUNNING


async def test_an_act_on_all_sagas_there_are_is_refused(operator: Operator) -> None:
    with pytest.raises(ConfigurationError, match="say which sagas are meant"):
        operator.act_on(Query(), Verb.CANCEL, **ABOUT)
    with pytest.raises(ConfigurationError, match="a rate is more than 0"):
        operator.act_on(TRIPS, Verb.CANCEL, **ABOUT, rate=0)
    with pytest.raises(ConfigurationError, match="say who does this, and why"):
        operator.act_on(TRIPS, Verb.CANCEL, by="ada", why=" ")


# Timers


async def test_all_that_is_due_is_listed_the_earliest_first(world: World, coordinator: Coordinator) -> None:
    await coordinator.take(wanted("late"), wanted("early"))
    await coordinator.take(reply((await world.instance("late")).id, "hotel"))
    other = await world.coordinator(Odd)
    coordinator.clock.advance(1)
    await other.take(wanted("odd"))
    found = await find_timers(coordinator.store, Query())
    shown = [(each.saga.key, each.step, each.what) for each in found]
    assert shown[:2] in (
        [("late", "payment", "the answer is late"), ("early", "hotel", "the answer is late")],
        [("early", "hotel", "the answer is late"), ("late", "payment", "the answer is late")],
    )
    assert shown[2:] == [("odd", "hotel", "the answer is late"), ("early", None, "the saga turns back")]
    assert [each.due_at for each in found] == sorted(each.due_at for each in found)
    assert [each.saga.key for each in await find_timers(coordinator.store, Query(step="payment"))] == ["late"]
    assert len(await find_timers(coordinator.store, Query(), limit=1)) == 1
    before = found[2].due_at
    assert len(await find_timers(coordinator.store, Query(), before=before)) == 2


async def test_timers_are_listed_in_their_order_however_many_there_are(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second timer of a saga may be earlier than the first of one that is read later."""
    monkeypatch.setattr("coordinator.timers._PAGE", 7)
    for number in range(5):
        await coordinator.take(*(wanted(f"t-{number}-{other}") for other in range(6)))
        coordinator.clock.advance(250)
    everything = await find_timers(coordinator.store, Query(), limit=1000)
    assert len(everything) == 60
    assert [each.due_at for each in everything] == sorted(each.due_at for each in everything)
    for limit in (1, 6, 7, 8, 30, 45):
        assert await find_timers(coordinator.store, Query(), limit=limit) == everything[:limit]


async def test_deadlines_of_many_sagas_are_moved_and_the_old_ones_do_not_fire(
    world: World, coordinator: Coordinator, operator: Operator
) -> None:
    await start(coordinator, 120)
    until = coordinator.store.clock.now() + timedelta(seconds=500)
    moved = operator.act_on(TRIPS, Verb.MOVE_DEADLINE, **ABOUT, step="hotel", until=until)
    assert len(keys(await run(moved))) == 120
    world.clock.advance(499)
    assert await coordinator.engine.deadlines.fire() == 0
    world.clock.advance(1)
    assert await coordinator.engine.deadlines.fire() == 120
    assert await world.history("t-119") == ["started", "move_deadline", "deadline"]


async def test_a_cancelled_deadline_never_fires(world: World, coordinator: Coordinator, operator: Operator) -> None:
    await start(coordinator, 1)
    await operator.act("t-000", Verb.CANCEL_DEADLINE, **ABOUT, step="hotel")
    await operator.act("t-000", Verb.CANCEL_DEADLINE, **ABOUT)
    assert await find_timers(coordinator.store, Query()) == []
    world.clock.advance(10_000_000)
    assert await coordinator.engine.deadlines.fire() == 0
    with pytest.raises(NotPossibleError, match="it has no deadline that could be cancelled"):
        await operator.act("t-000", Verb.CANCEL_DEADLINE, **ABOUT, step="hotel")


async def test_a_storm_of_deadlines_leaves_messages_as_much_time_as_it_takes(
    world: World, coordinator: Coordinator
) -> None:
    await coordinator.take(*(wanted(f"t-{number:03}") for number in range(250)))
    coordinator.clock.advance(10)

    async def takes_a_while() -> None:
        coordinator.clock.advance(0.25)

    with armed("engine.timers_committed", takes_a_while):
        firing = asyncio.create_task(coordinator.engine.deadlines.fire_all())
        await coordinator.clock.asleep(0.25)
    await coordinator.take(wanted("t-250"))
    assert len(await world.sent("cancel.hotel")) == 200
    coordinator.clock.advance(0.25)
    await firing
    assert len(await world.sent("cancel.hotel")) == 250
