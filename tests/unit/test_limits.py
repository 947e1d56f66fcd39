"""Limits on how much runs at a time, and how fast."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from itertools import pairwise

import pytest

from handlers.limits import Isolation, OneAtATime, Pace, Slots
from tests.support.flows import ManualClock


async def settle() -> None:
    """Let all tasks run until they wait."""
    for _ in range(20):
        await asyncio.sleep(0)


class Inside:
    """Who is in a block, and in which order they came."""

    def __init__(self) -> None:
        self.came: list[str] = []
        self.here: set[str] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leave: dict[str, asyncio.Event] = {}

    async def enter(self, name: str, block: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        leave = self._leave[name] = asyncio.Event()

        async def stay() -> None:
            async with block():
                self.came.append(name)
                self.here.add(name)
                await leave.wait()
                self.here.discard(name)

        self._tasks[name] = asyncio.create_task(stay())
        await settle()

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        await settle()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        await settle()
        self.here.discard(name)


async def test_slots_are_as_many_as_the_limit_says_even_while_it_changes() -> None:
    slots, got = Slots(2), 0

    async def take() -> None:
        nonlocal got
        await slots.acquire()
        got += 1

    tasks = [asyncio.create_task(take()) for _ in range(6)]
    await settle()
    assert (got, slots.taken) == (2, 2)
    slots.limit = 4
    await settle()
    assert got == 4
    slots.limit = 1
    for _ in range(3):
        slots.release()
    await settle()
    assert (got, slots.taken) == (4, 1)
    slots.release()
    await settle()
    assert (got, slots.taken) == (5, 1)
    tasks[-1].cancel()
    await settle()


async def test_a_waiter_that_is_cancelled_takes_no_slot_with_it() -> None:
    slots = Slots(1)
    await slots.acquire()
    first, second = (asyncio.create_task(slots.acquire()) for _ in range(2))
    await settle()
    slots.release()
    first.cancel()  # it has been woken, and has not run yet
    await settle()
    assert second.done()
    assert slots.taken == 1


async def pace_of(pace: Pace, clock: ManualClock, count: int, step: Callable[[], Awaitable[None]]) -> list[float]:
    passed: list[float] = []

    async def go() -> None:
        for _ in range(count):
            await pace.keep()
            passed.append(clock.monotonic())

    task = asyncio.create_task(go())
    while not task.done():
        await step()
    return passed


async def test_a_pace_lets_so_many_pass_a_second_evenly() -> None:
    clock = ManualClock()
    pace = Pace(clock)
    pace.rate = 4
    clock.advance(100)

    async def step() -> None:
        clock.advance(0.05)
        await settle()

    passed = await pace_of(pace, clock, 9, step)
    assert passed[-1] - passed[0] == pytest.approx(2, abs=0.15)
    assert all(0.15 < later - earlier < 0.35 for earlier, later in pairwise(passed))


@pytest.mark.parametrize("rate", [1000.0, None])
async def test_who_waits_for_a_slow_pace_follows_a_faster_one_at_once(rate: float | None) -> None:
    clock = ManualClock()
    pace = Pace(clock)
    pace.rate = 0.01
    await pace.keep()
    waiting = asyncio.create_task(pace.keep())
    await settle()
    clock.advance(0.5)
    await settle()
    assert not waiting.done()
    pace.rate = rate
    clock.advance(0.5)
    await settle()
    assert waiting.done()


async def test_who_waits_for_a_fast_pace_follows_a_slower_one() -> None:
    clock = ManualClock()
    pace = Pace(clock)
    pace.rate = 1.0
    await pace.keep()
    waiting = asyncio.create_task(pace.keep())
    await settle()
    pace.rate = 0.1
    for _ in range(19):
        clock.advance(0.5)
        await settle()
    assert not waiting.done()
    clock.advance(0.5)
    await settle()
    assert waiting.done()


async def test_several_who_wait_pass_one_after_the_other() -> None:
    clock = ManualClock()
    pace = Pace(clock)
    pace.rate = 1.0
    waiting = [asyncio.create_task(pace.keep()) for _ in range(4)]
    passed = []
    for _ in range(4):
        await settle()
        passed.append(sum(each.done() for each in waiting))
        clock.advance(0.5)
        await settle()
        clock.advance(0.5)
    assert passed == [1, 2, 3, 4]


async def test_without_a_rate_nobody_waits() -> None:
    clock = ManualClock()
    for _ in range(1000):
        await Pace(clock).keep()
    assert clock.sleeps == 0


async def test_one_at_a_time_per_key_in_the_order_of_asking() -> None:
    locks, inside = OneAtATime(), Inside()
    for name in ("a1", "a2", "a3", "b1"):
        await inside.enter(name, lambda name=name: locks.of(name[0]))  # type: ignore[misc]  # a default argument
    assert inside.here == {"a1", "b1"}
    await inside.leave("a1")
    assert inside.here == {"a2", "b1"}
    await inside.cancel("a3")
    await inside.leave("a2")
    await inside.leave("b1")
    assert inside.came == ["a1", "b1", "a2"]
    assert locks._queues == {}, "nothing is kept of keys that nobody holds"


async def test_a_turn_that_comes_as_its_taker_is_cancelled_goes_to_the_next() -> None:
    locks, inside = OneAtATime(), Inside()
    for name in ("first", "second", "third"):
        await inside.enter(name, lambda: locks.of("key"))
    inside._leave["first"].set()
    await asyncio.sleep(0)  # the second one is woken, and has not run yet
    await inside.cancel("second")
    assert "third" in inside.here
    await inside.leave("third")
    assert locks._queues == {}


async def test_who_is_alone_is_quite_alone_and_nobody_overtakes_him() -> None:
    isolation, inside = Isolation(), Inside()
    await inside.enter("one", isolation.shared)
    await inside.enter("two", isolation.shared)
    await inside.enter("suspect", isolation.alone)
    await inside.enter("later", isolation.shared)
    assert inside.here == {"one", "two"}
    await inside.leave("one")
    assert inside.here == {"two"}
    await inside.leave("two")
    assert inside.here == {"suspect"}
    await inside.enter("other", isolation.alone)
    await inside.leave("suspect")
    await inside.leave("later")
    await inside.leave("other")
    assert sorted(inside.came) == ["later", "one", "other", "suspect", "two"]
    assert inside.here == set()


async def test_who_wants_to_be_alone_again_and_again_lets_the_others_in_between() -> None:
    """They once waited for as long as there was another one: he asked before those who were woken could run."""
    isolation, inside = Isolation(), Inside()
    leave: asyncio.Queue[None] = asyncio.Queue()
    alone = 0

    async def again_and_again() -> None:
        nonlocal alone
        while True:
            async with isolation.alone():
                alone += 1
                await leave.get()

    task = asyncio.create_task(again_and_again())
    await settle()
    await inside.enter("one", isolation.shared)
    await inside.enter("two", isolation.shared)
    await inside.cancel("two")
    leave.put_nowait(None)
    await settle()
    assert (inside.here, alone) == ({"one"}, 1)
    await inside.leave("one")
    assert alone == 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_who_no_longer_wants_to_be_alone_lets_the_others_in() -> None:
    isolation, inside = Isolation(), Inside()
    await inside.enter("one", isolation.shared)
    await inside.enter("suspect", isolation.alone)
    await inside.enter("later", isolation.shared)
    await inside.cancel("suspect")
    assert inside.here == {"one", "later"}
