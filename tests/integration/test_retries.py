"""Messages that are tried again: when, by whom, how often; and those that kill their process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from events.database import transaction
from events.envelope import Envelope, Result
from events.failpoints import armed
from handlers import Breaker, Context, Handler, Retry, RetryAfter, handles
from handlers.breaker import Phase
from handlers.group import HandlerGroup
from handlers.retries import LEASE
from handlers.tables import retry
from tests.support.flows import (
    PATIENCE,
    START,
    ChargeCard,
    Charged,
    FakeBus,
    RefundCard,
    Stage,
    effects,
    enveloped,
    link,
    open_stage,
    until,
)

SLOW = Retry(attempts=4, quick=0, first=10, factor=2, most=15, jitter="none")


@pytest.fixture(params=["embedded", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    url = request.getfixturevalue("pg_url" if request.param == "postgres" else "sqlite_url")
    async with open_stage(url, embedded=request.param == "embedded") as opened:
        yield opened


@pytest.fixture
async def two(pg_url: str) -> AsyncIterator[tuple[Stage, Stage]]:
    """Two processes on one database, each with a bus of its own."""
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(open_stage(pg_url)) for _ in range(2)]
        yield first, second


class Script:
    """A handler that fails as often as it is told, for each order, and remembers its attempts."""

    def __init__(self, retry: Retry = SLOW, breaker: Breaker | None = None) -> None:
        self.failures: dict[str, int] = {}
        self.attempts: dict[str, list[int]] = {}
        self.error: Exception = ValueError("not now")
        self.hold: asyncio.Event | None = None
        self.begun: asyncio.Queue[str] = asyncio.Queue()

        @handles(ChargeCard, retry=retry, breaker=breaker)
        async def charge_card(command: ChargeCard, context: Context) -> Charged:
            order = command.order
            self.attempts.setdefault(order, []).append(context.attempt)
            self.begun.put_nowait(order)
            if self.hold is not None:
                await self.hold.wait()
            if len(self.attempts[order]) <= self.failures.get(order, 0):
                raise self.error
            return Charged(charge=order)

        self.handler = charge_card


def charge(order: str = "1") -> Envelope:
    return enveloped(ChargeCard(order=order), saga=link())


async def no_rows(stage: Stage) -> None:
    async def empty() -> bool:
        return not await stage.waiting()

    await until(empty)


async def abandon(group: HandlerGroup) -> None:
    """The process dies: nothing is given back, nothing is written any more."""
    for runner in group.runners.values():
        runner.parked.clear()
        for task in [*runner._tasks, *runner._taking._tasks, *runner._committing._tasks]:
            task.cancel()
    for task in group._supervisor._tasks:
        task.cancel()
    await asyncio.sleep(0)


async def test_a_message_that_waits_holds_up_nobody(stage: Stage) -> None:
    """Neither the bundle it came in, nor the queue, nor others that wait for less."""
    script = Script()
    script.failures = {"long": 2, "short": 1}
    await stage.start(script.handler)
    await stage.send(charge("long"), charge("good"))
    assert (await stage.replies.next()).data == b'{"charge":"good"}'
    await stage.settled(script.handler)
    await stage.pass_delay(1, 10)
    await stage.delayed(2)  # it waits for 15 s now
    await stage.send(charge("short"))
    await stage.settled(script.handler)
    await stage.pass_delay(1, 10)
    assert (await stage.replies.next()).data == b'{"charge":"short"}'
    stage.clock.advance(5)
    assert (await stage.replies.next()).data == b'{"charge":"long"}'
    assert script.attempts["long"] == [1, 2, 3]
    await no_rows(stage)


async def test_attempts_are_counted_over_restarts_and_shown_everywhere_the_same(stage: Stage) -> None:
    script = Script(Retry(attempts=3, quick=0, first=10, factor=1, jitter="none"))
    script.failures = {"1": 99}
    await stage.start(script.handler)
    sent = charge()
    await stage.send(sent)
    row = await stage.delayed(1)
    assert (row.message_id, row.saga_id, row.reason) == (sent.id, sent.saga and sent.saga.saga_id, "failed")
    assert (row.error_type, "not now" in (row.detail or "")) == ("ValueError", True)
    await stage.restart()
    await stage.start(script.handler)
    await stage.clock.asleep(0.4)
    stage.clock.advance(11)
    await stage.delayed(2)
    stage.clock.advance(11)
    reply = await stage.replies.next()
    assert (reply.type, b'"attempts":3' in reply.data) == ("failed", True)
    [letter] = await stage.dead()
    assert letter.attempts == 3
    assert letter.first_at == row.first_at
    assert script.attempts["1"] == [1, 2, 3]
    assert await stage.waiting() == []


async def test_the_saga_is_told_once_when_there_is_no_further_try(stage: Stage) -> None:
    script = Script(Retry(attempts=2, quick=0, first=10, jitter="none"))
    script.failures = {"1": 99}
    await stage.start(script.handler)
    await stage.send(charge())
    await stage.delayed(1)
    assert len(stage.replies) == 0
    assert await stage.handled() == []
    stage.clock.advance(10)
    reply = await stage.replies.next()
    assert reply.saga is not None
    assert reply.saga.result is Result.FAILED
    assert len(await stage.dead()) == len(await stage.handled()) == 1


async def test_a_duplicate_of_a_message_that_waits_is_not_tried_early(stage: Stage) -> None:
    script = Script()
    script.failures = {"1": 1}
    await stage.start(script.handler)
    sent = charge()
    await stage.send(sent)
    await stage.delayed(1)
    await stage.send(sent)
    await stage.settled(script.handler)
    assert script.attempts["1"] == [1]
    [row] = await stage.waiting()
    assert row.attempts == 1
    stage.clock.advance(10)
    assert (await stage.replies.next()).type == "charged"
    assert script.attempts["1"] == [1, 2]


async def test_an_error_may_say_when_to_come_again(stage: Stage) -> None:
    script = Script(Retry(quick=4, first=1))
    script.failures, script.error = {"1": 1}, RetryAfter(40, "too many requests")
    await stage.start(script.handler)
    await stage.send(charge())
    row = await stage.delayed(1)
    assert timedelta(seconds=39) < row.due_at - row.first_at < timedelta(seconds=43)
    assert script.attempts["1"] == [1], "no quick tries"


async def test_some_errors_are_never_tried_again(stage: Stage) -> None:
    script = Script(Retry(never=(ValueError,)))
    script.failures = {"1": 99}
    await stage.start(script.handler)
    await stage.send(charge())
    assert (await stage.replies.next()).type == "failed"
    assert script.attempts["1"] == [1]


async def test_a_handler_with_a_session_leaves_nothing_of_a_failed_try(stage: Stage) -> None:
    @handles(ChargeCard, retry=SLOW)
    async def charge_card(command: ChargeCard, session: AsyncSession, context: Context) -> Charged:
        await session.execute(effects.insert().values(what=f"attempt {context.attempt}"))
        if context.attempt == 1:
            raise ValueError
        return Charged(charge=command.order)

    await stage.start(charge_card)
    await stage.send(charge())
    await stage.pass_delay(1, 10)
    assert (await stage.replies.next()).type == "charged"
    assert await stage.effects() == ["attempt 2"]
    await no_rows(stage)


async def test_stop_gives_back_what_it_has_taken_without_counting_it(stage: Stage) -> None:
    script = Script()
    script.failures = {"1": 1}
    group = await stage.start(script.handler)
    await stage.send(charge())
    await stage.delayed(1)
    script.hold = asyncio.Event()
    await script.begun.get()
    stage.clock.advance(10)
    async with asyncio.timeout(PATIENCE):
        await script.begun.get()
    [row] = await stage.waiting()
    assert (row.attempts, row.begun_at is not None) == (2, True)
    await group.stop(0)
    [row] = await stage.waiting()
    assert (row.attempts, row.begun_at, row.crashes) == (1, None, 0)


async def test_what_was_taken_and_has_not_begun_goes_back_when_the_handler_is_paused(stage: Stage) -> None:
    """Its lease is not renewed any more: once that kept the message from ever being due again."""
    script = Script(replace(SLOW, attempts=9))
    script.failures = {"1": 1, "2": 1}
    group = await stage.start(replace(script.handler, concurrency=1))
    runner = group.runners[script.handler.name]
    await stage.send(charge("1"), charge("2"))

    async def both_wait() -> bool:
        return [row.begun_at for row in await stage.waiting()] == [None, None]

    await until(both_wait)
    for _ in range(2):
        await script.begun.get()
    script.hold = asyncio.Event()
    stage.clock.advance(12)
    async with asyncio.timeout(PATIENCE):
        await script.begun.get()

    async def both_taken() -> bool:
        return len(runner.parked) == 2

    await until(both_taken)
    await stage.pause(group, script.handler.name)
    script.hold.set()

    async def one_is_back() -> bool:
        rows = await stage.waiting()
        return [(row.attempts, row.begun_at) for row in rows] == [(1, None)] and not runner.parked

    await until(one_is_back)
    await stage.pause(group, script.handler.name, paused=False)
    stage.clock.advance(1)
    await no_rows(stage)
    assert sorted(script.attempts.values()) == [[1, 2], [1, 2]]


async def test_what_comes_a_second_time_is_counted_before_it_is_tried(stage: Stage) -> None:
    script = Script()
    script.hold = asyncio.Event()
    group = await stage.start(script.handler)
    await stage.send(charge())
    async with asyncio.timeout(PATIENCE):
        await script.begun.get()
    await abandon(group)
    await stage.restart()
    await stage.start(script.handler)
    async with asyncio.timeout(PATIENCE):
        await script.begun.get()
    [row] = await stage.waiting()
    assert (row.attempts, row.crashes) == (1, 0)
    assert row.begun_at is not None
    script.hold.set()
    assert (await stage.replies.next()).type == "charged"
    await no_rows(stage)


async def die_of(stage: Stage, handler: Handler, begun: asyncio.Queue[str], group: HandlerGroup) -> HandlerGroup:
    """The process ends while a message is tried; another one starts, when the lease is over."""
    async with asyncio.timeout(PATIENCE):
        await begun.get()
    await abandon(group)
    await stage.restart()
    async with transaction(stage.engine) as connection:
        await connection.execute(retry.update().values(due_at=START))
    return await stage.start(handler)


async def test_f47_a_message_that_kills_its_process_is_given_up_on_and_the_others_are_not(stage: Stage) -> None:
    """The others ran beside it when it died first; they are tried alone, and are not blamed."""
    poison = asyncio.Event()
    begun: asyncio.Queue[str] = asyncio.Queue()
    running: set[str] = set()
    done: list[str] = []

    @handles(ChargeCard, retry=Retry(crashes=2))
    async def charge_card(command: ChargeCard, context: Context) -> Charged:
        running.add(command.order)
        try:
            if command.order == "poison":
                if context.attempt > 1:
                    assert running == {"poison"}, "who is suspect runs alone"
                begun.put_nowait("poison")
                await poison.wait()
            done.append(command.order)
            return Charged(charge=command.order)
        finally:
            running.discard(command.order)

    group = await stage.start(charge_card)
    await stage.send(*(charge(order) for order in ("a", "poison", "b")))
    for _ in range(3):
        group = await die_of(stage, charge_card, begun, group)
    [letter] = await stage.dead_letters(1)
    assert (letter.reason, letter.attempts, b"poison" in letter.body) == ("crashed", 2, True)
    assert set(done) == {"a", "b"}, "run again where the process died before the commit"
    await no_rows(stage)
    assert len(await stage.handled()) == 3


async def test_a_suspect_and_who_has_its_key_do_not_wait_for_each_other(stage: Stage) -> None:
    """Who had the key once kept it while it waited until nobody was alone, and who was alone waited for the key."""
    script = Script()
    script.failures = {"suspect": 1}
    group = await stage.start(replace(script.handler, key=lambda _: "the same"))
    await stage.send(charge("suspect"))
    await stage.delayed(1)
    script.hold = asyncio.Event()
    await stage.send(charge("first"), charge("second"))

    async def are_begun() -> bool:
        return len(script.attempts) == 2 and len(group.runners[script.handler.name]._running) == 2

    await until(are_begun)
    async with transaction(stage.engine) as connection:  # somebody has tried it, and died
        await connection.execute(retry.update().values(begun_at=START, due_at=START))
    await stage.clock.pass_sleep(0.4)

    async def is_claimed_for() -> bool:
        return group._tools.isolation.is_taken

    await until(is_claimed_for)
    script.hold.set()
    assert {(await stage.replies.next()).type for _ in range(3)} == {"charged"}
    assert script.attempts == {"suspect": [1, 2], "first": [1], "second": [1]}


@pytest.mark.postgres
async def test_a_message_that_is_due_is_tried_by_one_process(two: tuple[Stage, Stage]) -> None:
    first, second = two
    script = Script()
    script.failures = {str(number): 1 for number in range(40)}
    await first.start(script.handler)
    await second.start(script.handler)
    await first.send(*(charge(str(number)) for number in range(40)))

    async def all_wait() -> bool:
        return len(await first.waiting()) == 40

    await until(all_wait)
    for stage in two:
        stage.clock.advance(12)
    await no_rows(first)
    assert all(attempts == [1, 2] for attempts in script.attempts.values())
    assert len(script.attempts) == 40


@pytest.mark.postgres
async def test_the_lease_of_a_slow_try_is_renewed_and_that_of_a_dead_process_is_not(two: tuple[Stage, Stage]) -> None:
    living, other = two
    script = Script(Retry(quick=0, first=1, jitter="none"))
    script.failures = {"1": 1}
    group = await living.start(script.handler)
    await living.send(charge())
    await living.delayed(1)
    await script.begun.get()
    script.hold = asyncio.Event()
    living.clock.advance(2)
    async with asyncio.timeout(PATIENCE):
        await script.begun.get()
    await other.start(script.handler)
    [row] = await living.waiting()
    living.clock.advance(LEASE / 3)

    async def is_renewed() -> bool:
        [now] = await living.waiting()
        return bool(now.due_at > row.due_at)

    await until(is_renewed)
    await abandon(group)
    script.hold = None
    other.clock.advance(LEASE + 10)  # a database's clock is asked again after 30 s
    assert (await other.replies.next()).type == "charged"
    assert script.attempts["1"] == [1, 2, 3]


@pytest.mark.postgres
@pytest.mark.parametrize("end", ["fails", "stops"])
async def test_a_process_whose_lease_has_passed_on_does_not_touch_the_try_of_another_one(
    two: tuple[Stage, Stage], end: str
) -> None:
    """Once it set the attempts back and made the message due, while another process was trying it."""
    slow, other = two
    script = Script(Retry(attempts=9, quick=0, first=1, jitter="none"))
    script.failures = {"1": 3}

    async def has_begun() -> asyncio.Event:
        async with asyncio.timeout(PATIENCE):
            await script.begun.get()
        assert script.hold is not None
        return script.hold

    group = await slow.start(script.handler)
    await slow.send(charge())
    await slow.delayed(1)
    await script.begun.get()
    script.hold = asyncio.Event()
    slow.clock.advance(2)
    first = await has_begun()
    script.hold = asyncio.Event()
    await other.start(script.handler)
    other.clock.advance(LEASE + 10)  # nobody has renewed it: the slow process has stood still
    second = await has_begun()
    [row] = await other.waiting()

    if end == "fails":
        first.set()

        async def has_lost_it() -> bool:
            return not group.runners["charge_card"].parked

        await until(has_lost_it)
    else:
        await group.stop(0)
    assert await other.waiting() == [row]
    assert (row.attempts, row.crashes) == (3, 1)
    script.failures.clear()
    second.set()
    assert (await other.replies.next()).type == "charged"
    await no_rows(other)


async def test_a_process_that_could_not_renew_its_leases_takes_nothing_from_itself(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once took its own rows for those of a dead process, waited for itself, and did nothing else for ever."""
    script = Script(replace(SLOW, attempts=9))
    script.failures = {"1": 1, "2": 1}
    done: list[str] = []

    @handles(RefundCard)
    async def refund_card(command: RefundCard) -> None:
        done.append(command.order)

    group = await stage.start(replace(script.handler, concurrency=1), refund_card)
    runner = group.runners[script.handler.name]
    await stage.send(charge("1"), charge("2"))
    for _ in range(2):
        await script.begun.get()

    async def both_wait() -> bool:
        return [row.begun_at for row in await stage.waiting()] == [None, None]

    async def both_taken() -> bool:
        return len(runner.parked) == 2

    await until(both_wait)
    script.hold = asyncio.Event()
    stage.clock.advance(12)
    async with asyncio.timeout(PATIENCE):
        await script.begun.get()
    await until(both_taken)
    failed = 0

    async def is_away(_: Any) -> None:
        nonlocal failed
        failed += 1
        raise ConnectionRefusedError

    with monkeypatch.context() as patched:
        patched.setattr(stage.retries, "renew", is_away)
        stage.clock.advance(LEASE + 1)

        async def is_asked_for() -> bool:
            return failed > 0

        await until(is_asked_for)
    looked = stage.clock.sleeps
    stage.clock.advance(0.4)

    async def has_looked() -> bool:
        return stage.clock.sleeps > looked and all(row.due_at > stage.clock.now() for row in await stage.waiting())

    await until(has_looked)
    await stage.send(enveloped(RefundCard(order="3")))

    async def is_done() -> bool:
        return done == ["3"]

    await until(is_done)
    assert [row.crashes for row in await stage.waiting()] == [0, 0]
    script.hold.set()
    for _ in range(2):
        assert (await stage.replies.next()).type == "charged"
    assert sorted(script.attempts.values()) == [[1, 2], [1, 2]]
    await no_rows(stage)


async def test_a_row_that_its_own_process_holds_is_not_claimed_although_its_lease_has_lapsed(stage: Stage) -> None:
    script = Script()
    script.failures = {"1": 1}
    await stage.start(script.handler)
    await stage.send(charge())
    row = await stage.delayed(1)
    await stage.close()
    stage.clock.advance(20)
    [held] = await stage.retries.claim(script.handler.name, 1)
    stage.clock.advance(LEASE + 1)
    assert await stage.retries.claim(script.handler.name, 1, held=[row.id], suspects=True) == []
    [taken] = await stage.retries.claim(script.handler.name, 1, suspects=True)
    assert (taken.id, taken.crashes) == (held.id, 1)


async def test_a_suspect_that_cannot_be_tried_now_is_not_asked_for_again_at_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was once, for as long as a duplicate of it was in work, and that could not begin."""
    script = Script()
    group = await stage.start(script.handler)
    runner = group.runners[script.handler.name]
    claims = 0

    async def claim(*_: Any, **__: Any) -> list[Any]:
        nonlocal claims
        claims += 1
        assert claims < 3
        return ["a row"]

    async def cannot(_: Any) -> bool:
        return False

    monkeypatch.setattr(stage.retries, "claim", claim)
    monkeypatch.setattr(runner, "run_at_once", cannot)
    group._suspects = {script.handler.name}
    await group._try_suspects()
    assert claims == 1


async def test_a_breaker_stops_the_queue_and_asks_with_one_message_at_a_time(stage: Stage) -> None:
    breaker = Breaker("bank", minimum=2, window=2, open_for=5, most=8)
    script = Script(Retry(attempts=4, quick=0, first=1, jitter="none"), breaker)
    script.failures = dict.fromkeys("12345", 99)
    group = await stage.start(script.handler)
    circuit = group.circuits["bank"]
    await stage.send(charge("1"))
    await stage.send(charge("2"))

    async def is_open() -> bool:
        return not circuit.is_closed and len(await stage.waiting()) == 2

    async def is_open_again() -> bool:
        return circuit.state.phase is Phase.OPEN

    await until(is_open)
    await stage.send(charge("3"))
    for wait in (5, 8):  # each single try fails: open for twice as long, up to a bound
        before = sum(len(each) for each in script.attempts.values())
        stage.clock.advance(wait - 1)
        stage.clock.advance(1)

        async def probed(before: int = before) -> bool:
            tries = sum(len(each) for each in script.attempts.values())
            return tries == before + 1 and all(row.begun_at is None for row in await stage.waiting())

        await until(probed)
        await until(is_open_again)
    assert sorted([script.attempts["1"], script.attempts["2"]]) == [[1], [1, 2]]
    assert script.attempts["3"] == [1], "the next one to ask came from the queue"

    async def all_wait() -> bool:
        return sorted(row.attempts for row in await stage.waiting()) == [1, 1, 2]

    await until(all_wait)
    script.failures = {}
    stage.clock.advance(8)
    assert (await stage.replies.next()).type == "charged"
    stage.clock.advance(5)
    for _ in range(2):
        assert (await stage.replies.next()).type == "charged"
    assert circuit.is_closed
    await no_rows(stage)


async def test_where_nothing_waits_a_message_is_taken_from_the_queue_to_ask(sqlite_url: str) -> None:
    async with open_stage(sqlite_url) as stage:
        assert isinstance(stage.bus, FakeBus)
        breaker = Breaker("bank", minimum=1, window=1, open_for=20)
        script = Script(Retry(attempts=1), breaker)
        script.failures = {"1": 99}
        group = await stage.start(script.handler)
        await stage.send(charge("1"))
        assert (await stage.replies.next()).type == "failed"
        await stage.send(charge("2"))
        await stage.send(charge("3"))
        assert not group.circuits["bank"].is_closed
        assert "2" not in script.attempts
        stage.clock.advance(20)
        for _ in range(2):
            assert (await stage.replies.next()).type == "charged"
        assert group.circuits["bank"].is_closed


async def test_a_claim_that_dies_before_anything_begins_is_only_a_try(stage: Stage) -> None:
    script = Script()
    script.failures = {"1": 1}
    await stage.start(script.handler)
    await stage.send(charge())
    await stage.delayed(1)

    async def fail() -> None:
        raise ConnectionResetError("the database went away")

    with armed("retries.claimed", fail):
        stage.clock.advance(10)

        async def is_claimed() -> bool:
            return any(row.begun_at is not None for row in await stage.waiting())

        await until(is_claimed)
    stage.clock.advance(LEASE + 1)
    assert (await stage.replies.next()).type == "charged"
    assert script.attempts["1"] == [1, 3]
    await no_rows(stage)
