"""A breaker at work: what is consumed, handed back, and tried, while a dependency is away."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from events.derive import derive_id
from events.envelope import Direction, Envelope, SagaLink
from events.failpoints import armed
from events.rabbitmq import RabbitMQBus
from handlers import Breaker, Context, Declined, Handler, Retry, handles
from handlers.breaker import Phase
from handlers.group import HandlerGroup
from tests.support.flows import (
    PATIENCE,
    ChargeCard,
    Charged,
    FakeBus,
    FakeDelivery,
    OrderPlaced,
    RefundCard,
    Stage,
    enveloped,
    link,
    open_stage,
    until,
)
from tests.support.rabbitmq import wire

RETRY = Retry(attempts=4, quick=0, first=1, jitter="none")
BANK = Breaker("bank", minimum=2, window=2, open_for=5, most=8)


class BankError(Exception):
    """The bank does not answer."""


class Bank:
    """A third party, and handlers that need it."""

    def __init__(self) -> None:
        self.error: Exception | None = BankError()
        self.answer = asyncio.Event()
        self.answer.set()
        self.refuses: set[str] = set()  # orders with which it fails although it is there
        self.calls: list[str] = []
        self.attempts: dict[str, list[int]] = {}

    async def ask(self, order: str, context: Context) -> Charged:
        self.calls.append(order)
        self.attempts.setdefault(order, []).append(context.attempt)
        await self.answer.wait()
        if self.error is not None or order in self.refuses:
            raise self.error or BankError
        return Charged(charge=order)

    def handler(self, name: str = "charge_card", *, breaker: Breaker = BANK, **policy: Any) -> Handler:
        @handles(ChargeCard, name=name, breaker=breaker, **{"retry": RETRY, **policy})
        async def charge(command: ChargeCard, context: Context) -> Charged:
            return await self.ask(command.order, context)

        return charge

    def in_session(self, **policy: Any) -> Handler:
        @handles(ChargeCard, name="charge_card", breaker=BANK, **{"retry": RETRY, **policy})
        async def charge(command: ChargeCard, context: Context, session: AsyncSession) -> Charged:
            assert session.is_active
            return await self.ask(command.order, context)

        return charge


@pytest.fixture(params=["embedded", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    url = request.getfixturevalue("pg_url" if request.param == "postgres" else "sqlite_url")
    async with open_stage(url, embedded=request.param == "embedded") as opened:
        yield opened


@pytest.fixture
async def fake(sqlite_url: str) -> AsyncIterator[tuple[Stage, FakeBus]]:
    """A stage whose bus is in memory, to see what is done to each delivery."""
    async with open_stage(sqlite_url) as opened:
        assert isinstance(opened.bus, FakeBus)
        yield opened, opened.bus


def charge(order: str = "1") -> Envelope:
    return enveloped(ChargeCard(order=order), saga=link())


def delivery(*orders: str) -> FakeDelivery:
    return FakeDelivery(b"[" + b",".join(charge(order).encode() for order in orders) + b"]")


async def until_phase(group: HandlerGroup, phase: Phase) -> None:
    async def is_there() -> bool:
        return group.circuits["bank"].state.phase is phase

    await until(is_there)


async def open_by_failures(stage: Stage, group: HandlerGroup, *orders: str) -> None:
    """Let the breaker open because of `orders`; they wait in the table then."""
    for order in orders:
        await stage.send(charge(order))

    async def all_wait() -> bool:
        return len(await stage.waiting()) == len(orders)

    await until(all_wait)
    await until_phase(group, Phase.OPEN)


async def look_around(stage: Stage) -> None:
    """Let everybody do what they can do by now: each look at the database lets all others run."""
    for _ in range(30):
        await stage.waiting()


async def test_while_it_is_open_nothing_is_consumed_and_what_has_not_begun_goes_back(
    fake: tuple[Stage, FakeBus],
) -> None:
    stage, bus = fake
    bank = Bank()
    handler = bank.handler(concurrency=1)
    group = await stage.start(handler)
    deliveries = [delivery(str(number)) for number in range(8)]
    bus.put(handler.queue.name, *deliveries)
    await until_phase(group, Phase.OPEN)

    async def all_back() -> bool:
        return [each.requeues for each in deliveries] == [0, 0] + [1] * 6

    await until(all_back)

    async def both_wait() -> bool:
        return [row.attempts for row in await stage.waiting()] == [1, 1]

    await until(both_wait)
    assert handler.queue.name not in bus._consumers
    assert bank.calls == ["0", "1"]


@pytest.mark.rabbitmq
async def test_on_rabbitmq_the_queue_keeps_what_is_not_consumed_and_is_drained_when_it_closes(
    amqp_url: str, sqlite_url: str
) -> None:
    async with open_stage(sqlite_url, amqp_url=amqp_url) as stage, wire(amqp_url) as channel:
        assert isinstance(stage.bus, RabbitMQBus)
        bank = Bank()
        handler = bank.handler(concurrency=1)

        async def in_queue() -> tuple[int | None, int | None]:
            found = await channel.declare_queue(f"saga.{handler.queue.name}", passive=True)
            return found.declaration_result.message_count, found.declaration_result.consumer_count

        group = await stage.start(handler)
        for number in range(20):
            await stage.send(charge(str(number)))

        async def is_back() -> bool:
            return len(await stage.waiting()) == 2 and await in_queue() == (18, 0)

        await until(is_back)
        assert group.circuits["bank"].state.phase is Phase.OPEN
        assert len(bank.calls) == 2
        bank.error = None
        stage.clock.advance(5)
        await stage.clock.asleep(0.4)
        stage.clock.advance(5)
        for _ in range(20):
            assert (await stage.replies.next()).type == "charged"

        async def is_drained() -> bool:
            return await in_queue() == (0, 1)

        await until(is_drained)
        assert all(attempts[-1] <= 2 for attempts in bank.attempts.values())


async def test_tries_that_were_under_way_when_it_opened_are_not_counted(stage: Stage) -> None:
    bank = Bank()
    bank.answer.clear()
    group = await stage.start(bank.handler(concurrency=6, retry=Retry(attempts=2, quick=0, first=1, jitter="none")))
    for number in range(6):
        await stage.send(charge(str(number)))

    async def all_run() -> bool:
        return len(bank.calls) == 6

    await until(all_run)
    bank.answer.set()

    async def all_wait() -> bool:
        return sorted(row.attempts for row in await stage.waiting()) == [0] * 4 + [1] * 2

    await until(all_wait)
    await until_phase(group, Phase.OPEN)


async def test_a_message_that_only_fails_itself_does_not_keep_it_open(stage: Stage) -> None:
    """The same one was asked again and again once, for ever, and all others waited behind it."""
    bank = Bank()
    group = await stage.start(bank.handler())
    await open_by_failures(stage, group, "1", "2")
    bank.refuses = {"1", "2"}
    bank.error = None
    await stage.send(charge("3"))
    await stage.clock.asleep(0.4)
    stage.clock.advance(5)

    async def has_failed() -> bool:
        return group.circuits["bank"].state.failed_probes == 1

    await until(has_failed)
    assert bank.calls[2:] in (["1"], ["2"])
    await stage.clock.asleep(0.4)
    stage.clock.advance(8)
    assert (await stage.replies.next()).type == "charged"
    assert bank.calls[3] == "3", "the next one to ask came from the queue"


async def test_a_message_that_fails_as_the_single_try_uses_up_its_attempts(stage: Stage) -> None:
    bank = Bank()
    group = await stage.start(bank.handler())
    await open_by_failures(stage, group, "1", "2")

    async def are_dead() -> bool:
        await stage.clock.asleep(0.4)
        stage.clock.advance(1)
        return len(await stage.dead()) == 2

    await until(are_dead)
    assert {row.attempts for row in await stage.dead()} == {4}
    assert len(bank.calls) == 8
    assert not group.circuits["bank"].is_closed


async def test_a_bundle_from_the_queue_asks_with_one_of_its_messages_and_the_others_wait_in_peace(
    fake: tuple[Stage, FakeBus],
) -> None:
    """They once were looked up in the inbox again and again, as fast as it went, while the one was tried."""
    stage, bus = fake
    bank = Bank()
    handler = bank.handler(breaker=Breaker("bank", minimum=1, window=1), retry=Retry(attempts=1))
    group = await stage.start(handler)
    await stage.send(charge("first"))
    await stage.dead_letters(1)
    await until_phase(group, Phase.OPEN)
    bus.put(handler.queue.name, delivery("a", "b", "c"), delivery("d"))
    bank.answer.clear()
    stage.clock.advance(5)

    async def is_asking() -> bool:
        return len(bank.calls) == 2

    await until(is_asking)
    inbox = group.runners[handler.name]._inbox
    looks = 0
    find = inbox.find

    async def counted(keys: Any) -> Any:
        nonlocal looks
        looks += 1
        return await find(keys)

    inbox.find = counted  # type: ignore[method-assign]
    await look_around(stage)
    assert looks < 3
    assert bank.calls == ["first", "a"]
    bank.error = None
    bank.answer.set()
    for _ in range(5):
        await stage.replies.next()
    assert sorted(bank.calls) == ["a", "b", "c", "d", "first"]


async def test_when_a_single_try_from_the_queue_fails_the_rest_of_its_bundle_is_not_tried(
    fake: tuple[Stage, FakeBus],
) -> None:
    stage, bus = fake
    bank = Bank()
    handler = bank.handler(breaker=Breaker("bank", minimum=1, window=1), retry=Retry(attempts=1))
    group = await stage.start(handler)
    await stage.send(charge("first"))
    await stage.dead_letters(1)
    bus.put(handler.queue.name, delivery("a", "b"))
    stage.clock.advance(5)

    async def has_failed() -> bool:
        return group.circuits["bank"].state.failed_probes == 1

    await until(has_failed)
    await look_around(stage)
    assert bank.calls == ["first", "a"]
    await stage.dead_letters(2)


async def test_a_message_that_needs_no_try_after_all_leaves_the_question_to_another(stage: Stage) -> None:
    """Its compensation came while it was tried. The breaker once waited for its answer for ever."""
    stage.commands = {"charge.card", "refund.card"}
    bank = Bank()

    @handles(RefundCard)
    async def refund_card(_: RefundCard) -> None:
        raise AssertionError("there is nothing to undo")

    group = await stage.start(bank.handler(), refund_card)
    saga = uuid4()
    command = derive_id(saga, "charge", "do", 1)
    do = enveloped(ChargeCard(order="barred"), id=str(command), saga=SagaLink(saga, "charge", Direction.DO, 1))
    undo = SagaLink(saga, "charge", Direction.UNDO, 1, undoes=command, undoes_type="charge.card")
    bank.answer.clear()
    await stage.send(do)

    async def is_tried() -> bool:
        return bank.calls == ["barred"]

    await until(is_tried)
    await stage.send(enveloped(RefundCard(order="barred"), saga=undo))
    assert (await stage.replies.next()).type == "succeeded"
    bank.answer.set()
    await stage.delayed(1)
    await stage.send(charge("other"))

    async def both_wait() -> bool:
        return len(await stage.waiting()) == 2 and not group.circuits["bank"].is_closed

    await until(both_wait)
    bank.error = None
    stage.clock.advance(5)
    assert (await stage.replies.next()).type == "failed"
    stage.clock.advance(1)
    assert (await stage.replies.next()).type == "charged"
    assert group.circuits["bank"].is_closed
    assert bank.calls == ["barred", "other", "other"]


@pytest.mark.parametrize("from_queue", [False, True])
async def test_a_single_try_that_is_cancelled_leaves_the_question_open(
    fake: tuple[Stage, FakeBus], from_queue: bool
) -> None:
    stage, _ = fake
    bank = Bank()
    breaker = Breaker("bank", minimum=1, window=1)
    group = await stage.start(bank.handler(breaker=breaker, retry=Retry(attempts=1 if from_queue else 4, quick=0)))
    await stage.send(charge("1"))
    await until_phase(group, Phase.OPEN)
    if from_queue:
        await stage.dead_letters(1)
        await stage.send(charge("2"))
    else:
        await stage.delayed(1)
    bank.answer.clear()
    stage.clock.advance(5)

    async def is_asking() -> bool:
        return len(bank.calls) == 2

    await until(is_asking)
    assert group.circuits["bank"].state.probing
    await group.stop(0)
    assert group.circuits["bank"].wants_probe
    assert [row.attempts for row in await stage.waiting()] == ([] if from_queue else [1])


async def test_a_business_no_is_an_answer_and_closes_it(stage: Stage) -> None:
    bank = Bank()
    group = await stage.start(bank.handler())
    await open_by_failures(stage, group, "1", "2")
    bank.error = Declined("no money")
    stage.clock.advance(5)
    assert (await stage.replies.next()).type == "refused"
    assert group.circuits["bank"].is_closed


@pytest.mark.parametrize("in_session", [False, True])
async def test_errors_that_do_not_speak_of_the_dependency_never_open_it(stage: Stage, in_session: bool) -> None:
    breaker = Breaker("bank", minimum=2, window=2, on=(BankError,))
    bank = Bank()
    bank.error = ValueError("a bug of ours")
    handler = bank.in_session() if in_session else bank.handler(breaker=breaker)
    if in_session:
        bank.error = Declined("no")  # an answer as well, out of a transaction
    group = await stage.start(handler)
    for number in range(4):
        await stage.send(charge(str(number)))

    async def all_done() -> bool:
        return len(bank.calls) == 4

    await until(all_done)
    await stage.settled(handler)
    assert group.circuits["bank"].is_closed


async def test_handlers_that_need_the_same_dependency_stop_together_and_ask_once(stage: Stage) -> None:
    bank = Bank()

    @handles(RefundCard, breaker=BANK, retry=RETRY)
    async def refund_card(command: RefundCard, context: Context) -> Charged:
        return await bank.ask(f"refund {command.order}", context)

    @handles(OrderPlaced)
    async def independent(event: OrderPlaced) -> None:
        bank.calls.append(f"independent {event.order}")

    group = await stage.start(bank.handler(), refund_card, independent)
    await open_by_failures(stage, group, "1", "2")
    await stage.send(enveloped(RefundCard(order="3"), saga=link()))
    await stage.send(enveloped(OrderPlaced(order="4")), exchange=independent.queue.bindings[0].exchange)

    async def is_independent() -> bool:
        return "independent 4" in bank.calls

    await until(is_independent)
    await look_around(stage)
    assert "refund 3" not in bank.calls
    bank.answer.clear()
    before = len(bank.calls)
    stage.clock.advance(5)

    async def is_asking() -> bool:
        return len(bank.calls) > before

    await until(is_asking)
    await look_around(stage)
    assert len(bank.calls) == before + 1, "one question for both"
    bank.error = None
    bank.answer.set()
    stage.clock.advance(1)
    assert {(await stage.replies.next()).type for _ in range(3)} == {"charged"}
    assert "refund 3" in bank.calls


async def test_messages_that_wait_for_their_key_do_not_run_when_it_has_opened_meanwhile(stage: Stage) -> None:
    """A bundle of them was once sent to the bank, one after the other, though the breaker was open."""
    bank = Bank()
    bank.answer.clear()
    handler = bank.handler(key="order", concurrency=2)
    group = await stage.start(handler)
    await stage.send(*(charge(str(number)) for number in range(20)))

    async def two_run() -> bool:
        return len(bank.calls) == 2

    await until(two_run)
    bank.answer.set()
    await until_phase(group, Phase.OPEN)
    await look_around(stage)
    assert len(bank.calls) == 2
    bank.error = None
    stage.clock.advance(5)

    async def is_closed() -> bool:
        return group.circuits["bank"].is_closed

    await until(is_closed)
    stage.clock.advance(1)
    assert {(await stage.replies.next()).type for _ in range(20)} == {"charged"}
    assert all(attempts in ([1], [1, 2]) for attempts in bank.attempts.values())


async def test_a_broker_that_is_away_when_it_closes_is_asked_again_for_the_queue(
    fake: tuple[Stage, FakeBus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else would make the handler consume again: once it never did."""
    stage, bus = fake
    bank = Bank()
    handler = bank.handler()
    group = await stage.start(handler)
    await open_by_failures(stage, group, "1", "2")
    consume, refused = bus.consume, 0

    async def fails_twice(*arguments: Any, **named: Any) -> Any:
        nonlocal refused
        if refused < 2:
            refused += 1
            raise ConnectionResetError
        return await consume(*arguments, **named)

    monkeypatch.setattr(bus, "consume", fails_twice)
    await stage.send(charge("3"))
    bank.error = None
    stage.clock.advance(5)
    await until_phase(group, Phase.CLOSED)
    for pause in (0.1, 0.2):
        await stage.clock.pass_sleep(pause)
    stage.clock.advance(1)
    assert {(await stage.replies.next()).type for _ in range(3)} == {"charged"}


async def test_what_is_claimed_while_it_opens_is_given_back(stage: Stage) -> None:
    """It once stayed in this process, its lease renewed, for as long as the breaker was open."""
    bank = Bank()
    bank.error = ValueError("fails once")
    handler = bank.handler(breaker=Breaker("bank", minimum=1, window=1, on=(BankError,)))
    group = await stage.start(handler)
    await stage.send(charge("1"))
    await stage.delayed(1)
    claimed, go_on = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        claimed.set()
        await go_on.wait()

    bank.error = BankError()
    with armed("retries.claimed", hold):
        stage.clock.advance(1)
        async with asyncio.timeout(PATIENCE):
            await claimed.wait()
        await stage.send(charge("2"))
        await until_phase(group, Phase.OPEN)
        await stage.delayed(1)
        while group.runners[handler.name].flow.is_open:  # noqa: ASYNC110  # it follows in a moment
            await asyncio.sleep(0)
        go_on.set()

        async def is_back() -> bool:
            return [(row.attempts, row.begun_at) for row in await stage.waiting()] == [(1, None), (1, None)]

        await until(is_back)
    assert bank.calls == ["1", "2"]


async def test_deliveries_go_back_although_the_database_is_away(
    fake: tuple[Stage, FakeBus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They once were forgotten: neither run nor given back, until the connection ended."""
    stage, bus = fake
    bank = Bank()
    handler = bank.handler(concurrency=1)
    group = await stage.start(handler)
    runner = group.runners[handler.name]
    bank.error = ValueError("fails once")
    await stage.send(charge("row"))
    await stage.delayed(1)
    bank.answer.clear()
    await stage.send(charge("running"))

    async def is_running() -> bool:
        return "running" in bank.calls

    await until(is_running)
    waiting = [delivery(str(number)) for number in range(3)]
    bus.put(handler.queue.name, *waiting)
    stage.clock.advance(1)

    async def is_taken() -> bool:
        return bool(runner.parked)

    await until(is_taken)

    async def is_away(_: Any) -> None:
        raise ConnectionRefusedError

    with monkeypatch.context() as patched:
        patched.setattr(stage.retries, "give_back", is_away)
        await stage.pause(group, handler.name)
        bank.answer.set()

        async def all_back() -> bool:
            return [each.requeues for each in waiting] == [1, 1, 1]

        await until(all_back)
    assert runner.parked == {}, "the lease of the row is not renewed"


async def test_time_alone_does_not_let_anybody_through(stage: Stage) -> None:
    bank = Bank()
    group = await stage.start(bank.handler())
    await open_by_failures(stage, group, "1", "2")
    await stage.send(charge("3"))
    stage.clock.advance(4.9)
    await stage.clock.asleep(0.4)
    await look_around(stage)
    assert bank.calls == ["1", "2"]
