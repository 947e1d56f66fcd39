"""Running a handler for one message, without a database or a bus."""

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from events.codec import Limits, Readable
from events.database import open_database
from events.derive import derive_id
from events.envelope import Direction, Envelope, Result, SagaLink
from events.errors import MalformedError
from events.ids import TimeOrderedIds
from events.intake import Intake, Item
from events.message import Message
from events.registry import Registry
from events.service import cancel_all
from handlers import Context, Declined, Handler, Retry, handles, timeouts
from handlers.answers import Answers
from handlers.execution import Execution, HandlerCancelledError, HandlerPanickedError
from handlers.fence import Fence
from handlers.keys import KeyLocks
from handlers.outcome import Outcome
from handlers.retries import Retries
from handlers.tools import Tools
from tests.support.flows import (
    PATIENCE,
    ChargeCard,
    Charged,
    FakeBus,
    FakeDelivery,
    ManualClock,
    OrderPlaced,
    PaymentCaptured,
    enveloped,
    envelopes,
    make_relay,
)

SAGA = UUID("01900000-0000-7000-8000-00000000abcd")
SECONDS = Retry(attempts=4, quick=2, first=3)


class Drawn:
    """Draws a third of what is asked, and remembers what that was."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, float]] = []

    def uniform(self, low: float, high: float) -> float:
        self.asked.append((low, high))
        return high / 3


class Impatient(ManualClock):
    """Remembers how long it was to sleep, and does not."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


def make_tools(clock: ManualClock, random: Drawn) -> Tools:
    """What a handler is lent; the database is in memory, and nobody asks it."""
    engine = open_database("sqlite://")
    bus, ids = FakeBus(), TimeOrderedIds()
    return Tools(
        engine=engine,
        bus=bus,
        outbox=make_relay(engine, bus, clock),
        container=None,
        clock=clock,
        ids=ids,
        random=random,
        limits=Limits(),
        fence=Fence(frozenset()),
        retries=Retries(engine, clock=clock, ids=ids),
        keys=KeyLocks(engine, clock=clock, random=random),
    )


class Bench:
    """One execution with its ports."""

    def __init__(self, handler: Handler) -> None:
        self.clock = Impatient()
        self.random = Drawn()
        tools = make_tools(self.clock, self.random)
        self.answers = Answers(handler, source="/tests/handler", tools=tools)
        self.execution = Execution(handler, Registry([handler.message]), self.answers, tools=tools)

    async def run(self, envelope: Envelope) -> Outcome:
        item = item_of(envelope)

        async def once(message: Message, context: Context) -> Outcome:
            return await self.execution.call(item, envelope, message, context, None)

        return await self.execution.run(item, envelope, once)


def item_of(envelope: Envelope) -> Item:
    intake = Intake(Limits())
    intake.deliver(FakeDelivery(b"[" + envelope.encode() + b"]"))
    [item] = intake._items
    assert isinstance(item.part, Readable)
    return item


def link(direction: Direction = Direction.DO, attempt: int = 1) -> SagaLink:
    return SagaLink(SAGA, "charge", direction, attempt)


def failing(error: BaseException, *, name: str = "bad", retry: Retry = SECONDS) -> tuple[Handler, list[int]]:
    runs: list[int] = []

    async def bad(command: ChargeCard, context: Context) -> None:
        assert command.order
        runs.append(context.attempt)
        raise error

    return handles(ChargeCard, name=name, retry=retry)(bad), runs


async def test_quick_tries_are_made_in_process_and_the_next_one_waits_in_the_database() -> None:
    handler, runs = failing(ValueError("no"))
    bench = Bench(handler)
    outcome = await bench.run(enveloped(ChargeCard(order="1"), saga=link()))
    assert runs == [1, 2, 3]
    assert bench.random.asked == [(0, 0.05), (0, 0.1), (0, 3)]
    assert bench.clock.slept == pytest.approx([0.05 / 3, 0.1 / 3])
    assert outcome.dead is None
    assert outcome.messages == [], "the saga is told when there is no further try"
    assert outcome.again is not None
    assert outcome.handled is None
    assert (outcome.again.attempts, outcome.again.reason, outcome.again.error_type) == (3, "failed", "ValueError")
    assert outcome.again.due_at == bench.clock.now() + timedelta(seconds=1)


@pytest.mark.parametrize("returns", [False, True])
async def test_a_handler_that_swallows_its_cancellation_is_cancelled_until_it_ends(
    returns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(timeouts, "_CANCEL_AGAIN", 0.01)
    swallowed: list[float] = []

    @handles(ChargeCard, timeout=0.01, retry=Retry(attempts=1))
    async def stubborn(_: ChargeCard) -> None:
        while len(swallowed) < 4:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed.append(bench.execution.timeouts.overdue)
        if not returns:
            await asyncio.Event().wait()

    bench = Bench(stubborn)
    running = asyncio.create_task(bench.run(enveloped(ChargeCard(order="1"))))
    done, _ = await asyncio.wait([running], timeout=PATIENCE)
    await cancel_all([running])
    assert done
    assert running.cancelling() == 0
    outcome = running.result()
    # One after the other; on a machine under load two that come at once are one for the handler.
    assert swallowed == sorted(set(swallowed))
    assert swallowed[-1] > 0.0299, "the first one is the timeout's"
    assert bench.execution.timeouts.overdue == 0
    assert outcome.result is (Result.SUCCEEDED if returns else Result.FAILED)
    assert {getattr(record, "action", "") for record in caplog.records} >= {"handler.overdue"}
    if not returns:
        assert outcome.dead is not None
        assert outcome.dead.error_type == "TimeoutError"


async def test_a_cancel_from_outside_ends_a_handler_that_had_swallowed_the_one_of_its_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timeouts, "_CANCEL_AGAIN", 0.01)
    swallows, swallowed = asyncio.Event(), 0
    swallows.set()

    @handles(ChargeCard, timeout=0.01, retry=Retry(attempts=1))
    async def stubborn(_: ChargeCard) -> None:
        nonlocal swallowed
        while swallows.is_set():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
        await asyncio.Event().wait()

    bench = Bench(stubborn)
    running = asyncio.create_task(bench.run(enveloped(ChargeCard(order="1"))))
    try:
        async with asyncio.timeout(PATIENCE):
            while swallowed < 3:  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0)
    finally:
        swallows.clear()
        await cancel_all([running])
    assert running.cancelled()


@pytest.mark.parametrize("attempts", [1, 2])
async def test_a_handler_is_run_as_often_as_its_policy_says(attempts: int) -> None:
    handler, runs = failing(ValueError("no"), retry=Retry(attempts=attempts))
    outcome = await Bench(handler).run(enveloped(ChargeCard(order="1")))
    assert len(runs) == attempts
    assert outcome.result is Result.FAILED
    assert outcome.dead is not None
    assert outcome.dead.attempts == attempts


async def test_a_decline_is_not_tried_again() -> None:
    handler, runs = failing(Declined("no"))
    outcome = await Bench(handler).run(enveloped(ChargeCard(order="1"), saga=link()))
    assert runs == [1]
    assert outcome.result is Result.DECLINED
    assert outcome.dead is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
async def test_what_ends_the_process_is_let_through(error: BaseException) -> None:
    handler, _ = failing(error)
    bench = Bench(handler)
    envelope = enveloped(ChargeCard(order="1"))
    message = ChargeCard(order="1")
    with pytest.raises(type(error)):
        await bench.execution.call(item_of(envelope), envelope, message, Context("1", "1"), None)


class PanicError(BaseException):
    """What a panic in a Rust extension looks like."""


@pytest.mark.parametrize(
    ("error", "wrapped"), [(asyncio.CancelledError(), HandlerCancelledError), (PanicError(), HandlerPanickedError)]
)
async def test_what_is_no_exception_becomes_one(error: BaseException, wrapped: type[Exception]) -> None:
    handler, _ = failing(error)
    envelope = enveloped(ChargeCard(order="1"))
    with pytest.raises(wrapped) as caught:
        await Bench(handler).execution.call(item_of(envelope), envelope, ChargeCard(order="1"), Context("1", "1"), None)
    assert caught.value.__cause__ is error


async def test_our_own_cancellation_is_let_through() -> None:
    begun = asyncio.Event()

    @handles(ChargeCard)
    async def endless(command: ChargeCard) -> None:
        assert command.order
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(Bench(endless).run(enveloped(ChargeCard(order="1"))))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_our_own_cancellation_during_a_later_try_is_let_through() -> None:
    begun = asyncio.Event()

    @handles(ChargeCard)
    async def endless(command: ChargeCard, context: Context) -> None:
        assert command.order
        if context.attempt == 1:
            raise ValueError("try again")
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(Bench(endless).run(enveloped(ChargeCard(order="1"))))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def contexts(*sent: Envelope) -> list[Context]:
    seen: list[Context] = []

    @handles(ChargeCard)
    async def look(command: ChargeCard, context: Context) -> None:
        assert command.order
        seen.append(context)

    for each in sent:
        await Bench(look).run(each)
    return seen


async def test_the_idempotency_key_is_one_for_all_attempts_of_a_step_in_one_direction() -> None:
    command = ChargeCard(order="1")
    first, again, undo = await contexts(
        enveloped(command, saga=link()),
        enveloped(command, saga=link(attempt=2)),
        enveloped(command, saga=link(Direction.UNDO)),
    )
    assert first.idempotency_key == again.idempotency_key == str(derive_id(SAGA, "charge", "do"))
    assert undo.idempotency_key == str(derive_id(SAGA, "charge", "undo"))
    assert (undo.saga_id, undo.step, undo.direction) == (SAGA, "charge", Direction.UNDO)


async def test_the_idempotency_key_of_other_messages_is_their_own() -> None:
    name = str(uuid4())
    uuid, foreign = await contexts(enveloped(ChargeCard(order="1"), id=name), enveloped(ChargeCard(order="1"), id="x"))
    assert uuid.idempotency_key == name
    assert UUID(foreign.idempotency_key).version == 8
    assert (uuid.saga_id, uuid.step, uuid.direction) == (None, None, None)


async def test_a_message_taken_twice_causes_messages_with_the_same_ids() -> None:
    @handles(ChargeCard)
    async def publish_two(command: ChargeCard, context: Context) -> PaymentCaptured:
        context.publish(OrderPlaced(order="a"))
        context.publish(OrderPlaced(order="b"))
        return PaymentCaptured(order=command.order)

    sent = enveloped(ChargeCard(order="1"), saga=link())
    one, other = [await Bench(publish_two).run(sent) for _ in range(2)]
    names = [[message.envelope.id for message in outcome.messages] for outcome in (one, other)]
    assert names[0] == names[1]
    assert len(set(names[0])) == 4
    assert [message.envelope.causation_id for message in one.messages] == [sent.id] * 4
    assert [message.envelope.correlation_id for message in one.messages[:3]] == [sent.id] * 3


async def test_a_reply_says_which_command_it_answers() -> None:
    @handles(ChargeCard)
    async def charge(command: ChargeCard) -> Charged:
        return Charged(charge=command.order)

    outcome = await Bench(charge).run(enveloped(ChargeCard(order="1"), saga=link(attempt=3)))
    [reply] = outcome.messages
    assert reply is outcome.reply
    assert (reply.address.exchange.value, reply.address.key) == ("replies", "tests")
    assert reply.envelope.saga == SagaLink(SAGA, "charge", Direction.DO, 3, Result.SUCCEEDED)
    assert envelopes(b"[" + reply.encode(Limits()) + b"]") == [reply.envelope]


@pytest.mark.parametrize("returned", ["text", 7, ChargeCard(order="1"), [], False])
async def test_only_events_and_replies_are_outcomes(returned: Any) -> None:
    @handles(ChargeCard, retry=Retry(attempts=1))
    async def wrong(command: ChargeCard) -> Any:
        assert command.order
        return returned

    outcome = await Bench(wrong).run(enveloped(ChargeCard(order="1")))
    assert outcome.dead is not None
    assert "return an Event, a Reply or None" in outcome.dead.detail


async def test_a_message_that_cannot_be_read_is_not_tried_and_no_attempt_is_counted() -> None:
    handler, runs = failing(ValueError("never run"))
    outcome = await Bench(handler).run(enveloped(OrderPlaced(order="1"), saga=link()))
    assert runs == []
    assert outcome.dead is not None
    assert (outcome.dead.reason, outcome.dead.attempts) == ("unknown_type", 0)
    assert outcome.reply is not None
    assert outcome.reply.envelope.type == "failed"


async def test_the_last_error_is_kept_with_its_stack_and_its_causes() -> None:
    @handles(ChargeCard, retry=Retry(attempts=1))
    async def chained(command: ChargeCard) -> None:
        try:
            dict[str, str]()[command.order]
        except KeyError as error:
            raise RuntimeError("no such order") from error

    outcome = await Bench(chained).run(enveloped(ChargeCard(order="1")))
    assert outcome.dead is not None
    assert "KeyError: '1'" in outcome.dead.detail
    assert "RuntimeError: no such order" in outcome.dead.detail
    assert __file__ in outcome.dead.detail


async def test_a_rejected_part_has_no_envelope_to_answer() -> None:
    handler, _ = failing(ValueError())
    intake = Intake(Limits())
    intake.deliver(FakeDelivery(b"nonsense"))
    outcome = Bench(handler).answers.reject(intake._items[0], MalformedError("no JSON"))
    assert outcome.envelope is None
    assert outcome.messages == []
    assert outcome.dead is not None
    assert outcome.dead.detail == "no JSON"
