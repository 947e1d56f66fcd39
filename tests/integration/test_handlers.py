"""What becomes of messages that handlers receive: on both databases, on the embedded bus, and some on RabbitMQ."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from dishka import Provider, Scope, make_async_container
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from events.bus import Exchange
from events.codec import Limits, bundle_body
from events.database import transaction
from events.envelope import Envelope, Result
from events.failpoints import armed
from events.message import Event, Reply
from handlers import Context, Declined, Retry, handles
from tests.support.flows import (
    PATIENCE,
    ChargeCard,
    Charged,
    FakeBus,
    FakeDelivery,
    OrderPlaced,
    PaymentCaptured,
    PaymentFailed,
    RefundCard,
    Stage,
    bodies,
    effects,
    enveloped,
    link,
    open_stage,
    until,
)

ONCE = Retry(attempts=1)
THRICE = Retry(attempts=3, quick=0, first=5, factor=3, most=100)
DATABASE_PAUSE = 0.5
SUPERVISOR_PAUSE = 0.1


@pytest.fixture(params=["embedded", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    url = request.getfixturevalue("pg_url" if request.param == "postgres" else "sqlite_url")
    async with open_stage(url, embedded=request.param == "embedded") as opened:
        yield opened


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def fake(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Stage, FakeBus]]:
    """A stage whose bus is in memory, for tests that hand over deliveries of their own."""
    url = request.getfixturevalue("pg_url" if request.param == "postgres" else "sqlite_url")
    async with open_stage(url) as opened:
        assert isinstance(opened.bus, FakeBus)
        yield opened, opened.bus


@pytest.fixture
async def on_rabbitmq(amqp_url: str, database_url: str) -> AsyncIterator[Stage]:
    async with open_stage(database_url, amqp_url=amqp_url) as opened:
        yield opened


class Gate:
    """Lets a handler say that it has begun, and holds it until the test opens."""

    def __init__(self) -> None:
        self.begun: asyncio.Queue[str] = asyncio.Queue()
        self._open = asyncio.Event()

    async def pass_through(self, who: str) -> None:
        self.begun.put_nowait(who)
        await self._open.wait()

    async def next(self) -> str:
        async with asyncio.timeout(PATIENCE):
            return await self.begun.get()

    def open(self) -> None:
        self._open.set()


class Halt:
    """What a fail point does when the process is to die there: it stands still until its task is cancelled."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()

    async def __call__(self) -> None:
        self._reached.set()
        await asyncio.Event().wait()

    async def reached(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self._reached.wait()


def failing(error: BaseException, *, times: int = 1) -> Callable[[], Awaitable[None]]:
    """What a fail point does that raises `error` the first `times` times."""
    left = [error] * times

    async def act() -> None:
        if left:
            raise left.pop()

    return act


@handles(ChargeCard)
async def keep(command: ChargeCard, session: AsyncSession) -> Charged:
    await session.execute(effects.insert().values(what=command.order))
    return Charged(charge=f"c-{command.order}")


def charge(order: str = "1") -> Envelope:
    return enveloped(ChargeCard(order=order), saga=link())


async def test_messages_of_two_types_with_one_id_are_two_messages(stage: Stage) -> None:
    """A careless client names all its messages after the order; only commands of sagas have ids of their own."""
    order = "01a20000-0000-7000-8000-000000000001"
    runs: list[str] = []

    @handles(ChargeCard)
    async def charge_card(_: ChargeCard) -> None:
        runs.append("charge")

    @handles(RefundCard)
    async def refund_card(_: RefundCard) -> None:
        runs.append("refund")

    await stage.start(charge_card)
    await stage.start(refund_card)
    for message in (ChargeCard(order="1"), RefundCard(order="1"), ChargeCard(order="1")):
        await stage.send(enveloped(message, id=order))
    await stage.settled(charge_card)
    await stage.settled(refund_card)
    assert sorted(runs) == ["charge", "refund"]


# Success


async def test_a_command_is_answered_once_it_is_recorded(stage: Stage) -> None:
    seen: list[Context] = []

    @handles(ChargeCard)
    async def charge_card(command: ChargeCard, context: Context) -> Charged:
        seen.append(context)
        return Charged(charge=f"c-{command.order}")

    await stage.start(charge_card)
    sent = charge()
    await stage.send(sent)

    reply = await stage.replies.next()
    assert (reply.type, reply.data) == ("charged", b'{"charge":"c-1"}')
    assert reply.saga is not None
    assert reply.saga.result is Result.SUCCEEDED
    assert sent.saga is not None
    assert (reply.saga.saga_id, reply.saga.step, reply.saga.attempt) == (sent.saga.saga_id, "charge", 1)
    assert reply.causation_id == sent.id
    assert [row.message_key for row in await stage.handled()] == [sent.key]
    assert seen[0].message_id == sent.id
    assert seen[0].saga_id == sent.saga.saga_id
    await stage.settled(charge_card)


async def test_a_handler_without_an_outcome_succeeds_without_words(stage: Stage) -> None:
    @handles(ChargeCard)
    async def charge_card(command: ChargeCard) -> None:
        assert command.order

    await stage.start(charge_card)
    await stage.send(charge())
    assert (await stage.replies.next()).type == "succeeded"


async def test_an_event_as_outcome_goes_to_the_saga_and_to_everybody(stage: Stage) -> None:
    @handles(ChargeCard)
    async def charge_card(command: ChargeCard, context: Context) -> PaymentCaptured:
        context.publish(PaymentFailed(order="published beside it"))
        return PaymentCaptured(order=command.order)

    await stage.start(charge_card)
    await stage.send(charge())
    assert (await stage.replies.next()).type == "payment.captured"
    published = {(await stage.events.next()).type for _ in range(2)}
    assert published == {"payment.captured", "payment.failed"}


async def test_a_command_of_no_saga_gets_no_reply(stage: Stage) -> None:
    await stage.start(keep)
    await stage.send(enveloped(ChargeCard(order="1")))
    await stage.settled(keep)
    assert await stage.effects() == ["1"]
    assert len(stage.replies) == 0


async def test_an_event_is_handled(stage: Stage) -> None:
    @handles(OrderPlaced)
    async def note_order(event: OrderPlaced, session: AsyncSession) -> None:
        await session.execute(effects.insert().values(what=event.order))

    await stage.start(note_order)
    await stage.send(enveloped(OrderPlaced(order="7")), exchange=Exchange.EVENTS)
    await stage.settled(note_order)
    assert await stage.effects() == ["7"]


async def test_effect_inbox_and_reply_are_one_transaction(fake: tuple[Stage, FakeBus]) -> None:
    stage, _ = fake
    halt = Halt()
    await stage.start(keep)
    sent = charge()
    with armed("handler.before_commit", halt):
        await stage.send(sent)
        await halt.reached()
        if stage.engine.dialect.name == "postgresql":  # SQLite's only connection is in use
            assert await stage.effects() == []
            assert await stage.handled() == []
            assert await stage.unsent() == []
        await stage.restart()
    assert await stage.effects() == []
    assert await stage.handled() == []
    assert await stage.unsent() == []
    assert len(stage.replies) == 0

    await stage.start(keep)
    assert (await stage.replies.next()).causation_id == sent.id
    assert await stage.effects() == ["1"]


# Duplicates


async def test_a_duplicate_is_not_run_again_and_gets_the_recorded_reply(stage: Stage) -> None:
    runs: list[str] = []

    @handles(ChargeCard)
    async def charge_card(command: ChargeCard, context: Context) -> Charged:
        runs.append(command.order)
        context.publish(PaymentCaptured(order=command.order))
        return Charged(charge=f"run {len(runs)}")

    await stage.start(charge_card)
    sent = charge()
    await stage.send(sent)
    first = await stage.replies.next()
    await stage.send(sent)
    again = await stage.replies.next()

    assert again == first
    assert runs == ["1"]
    await stage.settled(charge_card)
    assert len(stage.events) == 1, "the event is not published again"


async def test_duplicates_that_arrive_while_the_first_runs_wait_for_its_reply(stage: Stage) -> None:
    gate = Gate()
    runs: list[str] = []

    @handles(ChargeCard)
    async def charge_card(command: ChargeCard) -> Charged:
        runs.append(command.order)
        await gate.pass_through(command.order)
        return Charged(charge=str(len(runs)))

    await stage.start(charge_card)
    sent = charge()
    await stage.send(sent)
    await gate.next()
    await stage.send(sent, sent)
    gate.open()

    replies = [await stage.replies.next() for _ in range(3)]
    assert replies == [replies[0]] * 3
    assert len(runs) == 1
    await stage.settled(charge_card)


async def test_a_duplicate_is_not_run_when_its_first_commits_while_it_waits_for_a_slot(
    fake: tuple[Stage, FakeBus],
) -> None:
    """The inbox was read for the whole batch, before the first of it had committed."""
    stage, bus = fake
    runs: list[str] = []
    gates = {order: Gate() for order in "ABC"}

    @handles(ChargeCard, concurrency=1)
    async def charge_card(command: ChargeCard) -> None:
        runs.append(command.order)
        await gates[command.order].pass_through(command.order)

    await stage.start(charge_card)
    first, second, third = charge("A"), charge("B"), charge("C")
    deliveries = [FakeDelivery(bundle_body([each.encode()])) for each in (first, second, third, first)]
    bus.put(charge_card.queue.name, *deliveries)
    await gates["A"].next()
    gates["A"].open()
    await gates["B"].next()
    assert (await stage.replies.next()).causation_id == first.id
    gates["B"].open()
    gates["C"].open()

    await stage.settled(charge_card)
    assert runs == ["A", "B", "C"]
    answered = [(await stage.replies.next()).causation_id for _ in range(3)]
    assert sorted(filter(None, answered)) == sorted([first.id, second.id, third.id])


@pytest.mark.postgres
async def test_two_processes_with_the_same_message_have_one_effect_and_one_reply(pg_url: str) -> None:
    async with open_stage(pg_url) as stage:
        gate = Gate()

        @handles(ChargeCard)
        async def keep_held(command: ChargeCard, session: AsyncSession) -> Charged:
            await session.execute(effects.insert().values(what=command.order))
            await gate.pass_through(command.order)
            return Charged(charge="once")

        bus = stage.bus
        assert isinstance(bus, FakeBus)
        sent = charge()
        body = bundle_body([sent.encode()])
        await stage.start(keep_held)
        bus.put(keep_held.queue.name, FakeDelivery(body))
        await gate.next()
        await stage.start(keep_held)  # the same queue, the next consumer gets what comes from now on
        bus.put(keep_held.queue.name, FakeDelivery(body))
        await gate.next()
        gate.open()

        replies = [await stage.replies.next() for _ in range(2)]
        assert replies[0] == replies[1]
        await stage.settled(keep_held)
        assert await stage.effects() == ["1"]
        assert len(await stage.handled()) == 1


async def test_each_handler_has_an_inbox_of_its_own(stage: Stage) -> None:
    seen: asyncio.Queue[str] = asyncio.Queue()

    @handles(OrderPlaced)
    async def first(event: OrderPlaced) -> None:
        seen.put_nowait(f"first {event.order}")

    @handles(OrderPlaced)
    async def second(event: OrderPlaced) -> None:
        seen.put_nowait(f"second {event.order}")

    await stage.start(first)
    await stage.start(second)
    await stage.send(enveloped(OrderPlaced(order="1")), exchange=Exchange.EVENTS)
    await stage.settled(first)
    await stage.settled(second)
    assert {seen.get_nowait(), seen.get_nowait()} == {"first 1", "second 1"}


# Declined


@pytest.mark.parametrize(
    ("said", "kind"),
    [(PaymentFailed(order="1"), "payment.failed"), (Charged(charge="none"), "charged"), ("no money", "refused")],
)
async def test_a_decline_is_committed_and_replied_and_never_retried(
    stage: Stage, said: Event | Reply | str, kind: str
) -> None:
    runs: list[int] = []

    @handles(ChargeCard, retry=THRICE)
    async def decline(command: ChargeCard, session: AsyncSession) -> None:
        runs.append(1)
        await session.execute(effects.insert().values(what=f"declined {command.order}"))
        raise Declined(said)

    await stage.start(decline)
    await stage.send(charge())
    reply = await stage.replies.next()
    assert reply.type == kind
    assert reply.saga is not None
    assert reply.saga.result is Result.DECLINED
    assert await stage.effects() == ["declined 1"]
    await stage.settled(decline)
    assert runs == [1]
    assert await stage.dead() == []


# Technical failures


@pytest.mark.parametrize("in_session", [False, True])
async def test_a_failure_is_tried_again_with_growing_waits(stage: Stage, in_session: bool) -> None:
    runs: list[int] = []

    async def work(context: Context) -> Charged:
        runs.append(context.attempt)
        context.publish(PaymentCaptured(order=f"attempt {context.attempt}"))
        if context.attempt < 3:
            raise ValueError("not yet")
        return Charged(charge=f"attempt {context.attempt}")

    @handles(ChargeCard, retry=THRICE, name="flaky")
    async def without_session(command: ChargeCard, context: Context) -> Charged:
        assert command.order
        return await work(context)

    @handles(ChargeCard, retry=THRICE, name="flaky")
    async def with_session(command: ChargeCard, context: Context, session: AsyncSession) -> Charged:
        await session.execute(effects.insert().values(what=command.order))
        return await work(context)

    handler = with_session if in_session else without_session
    await stage.start(handler)
    await stage.send(charge())
    await stage.pass_delay(1, 5)
    await stage.pass_delay(2, 15)

    assert (await stage.replies.next()).data == b'{"charge":"attempt 3"}'
    assert (await stage.events.next()).data == b'{"order":"attempt 3"}'
    await stage.settled(handler)
    assert runs == [1, 2, 3]
    assert await stage.effects() == (["1"] if in_session else [])
    assert len(stage.events) == 0, "what a failed try wanted to publish is not published"
    assert await stage.dead() == []


@pytest.mark.parametrize("in_session", [False, True])
async def test_what_keeps_failing_is_kept_whole_with_its_reason_and_the_saga_is_told(
    stage: Stage, in_session: bool
) -> None:
    @handles(ChargeCard, retry=THRICE, name="broken")
    async def without_session(command: ChargeCard) -> None:
        raise LookupError(f"no card for {command.order}")

    @handles(ChargeCard, retry=THRICE, name="broken")
    async def with_session(command: ChargeCard, session: AsyncSession) -> None:
        await session.execute(effects.insert().values(what=command.order))
        raise LookupError(f"no card for {command.order}")

    handler = with_session if in_session else without_session
    await stage.start(handler)
    sent = charge()
    await stage.send(sent)
    await stage.pass_delay(1, 5)
    await stage.pass_delay(2, 15)

    reply = await stage.replies.next()
    assert reply.type == "failed"
    assert reply.saga is not None
    assert reply.saga.result is Result.FAILED
    assert json.loads(reply.data)["reason"] == "LookupError: no card for 1", "its stack is in the dead letter alone"
    [letter] = await stage.dead()
    assert letter.body == sent.encode()
    assert (letter.consumer, letter.reason, letter.attempts) == ("broken", "failed", 3)
    assert "Traceback" in letter.detail
    assert "LookupError: no card for 1" in letter.detail
    assert (letter.message_id, letter.message_type) == (sent.id, "charge.card")
    assert sent.saga is not None
    assert letter.saga_id == sent.saga.saga_id
    assert await stage.effects() == []
    await stage.settled(handler)


async def test_one_failing_message_does_not_hold_back_the_others_of_its_bundle(stage: Stage) -> None:
    @handles(ChargeCard, retry=THRICE)
    async def partly(command: ChargeCard) -> Charged:
        if command.order == "bad":
            raise ValueError("bad")
        return Charged(charge=command.order)

    await stage.start(partly)
    good, bad, last = charge("good"), charge("bad"), charge("last")
    await stage.send(good, bad, last)
    answered = {(await stage.replies.next()).causation_id for _ in range(2)}
    assert answered == {good.id, last.id}
    await stage.settled(partly)
    await stage.pass_delay(1, 5)
    await stage.pass_delay(2, 15)
    assert (await stage.replies.next()).causation_id == bad.id
    assert bodies(await stage.dead()) == [bad.encode()]
    await stage.settled(partly)


@pytest.mark.parametrize("in_session", [False, True])
async def test_a_handler_that_hangs_is_cancelled_after_its_timeout_and_given_up_on(
    stage: Stage, in_session: bool
) -> None:
    cancelled: list[str] = []

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append("yes")
            raise

    @handles(ChargeCard, retry=ONCE, timeout=0.5, name="slow")
    async def without_session(command: ChargeCard) -> None:
        assert command.order
        await hang()

    @handles(ChargeCard, retry=ONCE, timeout=0.5, name="slow")
    async def with_session(command: ChargeCard, session: AsyncSession) -> None:
        await session.execute(effects.insert().values(what=command.order))
        await hang()

    await stage.start(with_session if in_session else without_session)
    await stage.send(charge())
    assert (await stage.replies.next()).type == "failed"
    [letter] = await stage.dead()
    assert "TimeoutError" in letter.detail
    assert letter.attempts == 1
    assert cancelled == ["yes"]
    assert await stage.effects() == []


@pytest.mark.parametrize("error", [ConnectionRefusedError("payments are away"), TimeoutError("too slow")])
async def test_a_third_party_that_is_away_is_not_taken_for_the_database(stage: Stage, error: Exception) -> None:
    """Once such an error from a handler with a session was retried for ever, without burning an attempt."""

    @handles(ChargeCard, retry=ONCE)
    async def call_away(command: ChargeCard, session: AsyncSession) -> None:
        await session.execute(effects.insert().values(what=command.order))
        raise error

    await stage.start(call_away)
    await stage.send(charge())
    assert (await stage.replies.next()).type == "failed"
    assert type(error).__name__ in (await stage.dead())[0].detail
    assert await stage.effects() == []


async def test_a_statement_that_can_never_work_is_given_up_on(stage: Stage) -> None:
    """SQLite reports a missing table with the same class of error as a file that is locked for a moment."""

    @handles(ChargeCard, retry=ONCE)
    async def wrong_table(command: ChargeCard, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO no_such_table VALUES (:order)"), {"order": command.order})

    await stage.start(wrong_table)
    await stage.send(charge())
    assert (await stage.replies.next()).type == "failed"
    assert "no_such_table" in (await stage.dead())[0].detail


OWN_FAULTS = {
    "a timeout of statements": ("SET LOCAL statement_timeout = 20", "SELECT pg_sleep(10)"),
    "a lock that somebody holds": ("SET LOCAL lock_timeout = 20", "LOCK TABLE effect"),
    "a connection that it ends itself": ("SELECT pg_terminate_backend(pg_backend_pid())",),
}


@pytest.mark.postgres
@pytest.mark.parametrize("statements", OWN_FAULTS.values(), ids=OWN_FAULTS.keys())
async def test_what_the_database_refuses_a_handler_is_counted_and_given_up_on(
    pg_url: str, statements: tuple[str, ...]
) -> None:
    """Once such errors were taken for a database that is away, and tried for ever without being counted."""
    runs = 0
    async with open_stage(pg_url) as stage:

        @handles(ChargeCard, retry=Retry(attempts=2, quick=1))
        async def refused(command: ChargeCard, session: AsyncSession) -> None:
            nonlocal runs
            runs += 1
            assert command.order
            for statement in statements:
                await session.execute(text(statement))

        async with transaction(stage.engine) as connection:
            await connection.execute(text("LOCK TABLE effect IN ACCESS SHARE MODE"))
            await stage.start(refused)
            await stage.send(charge())

            async def is_given_up() -> bool:
                stage.clock.advance(0.1)
                return bool(await stage.dead())

            await until(is_given_up)
        [letter] = await stage.dead()
        assert letter.attempts == 2
        assert runs <= 10


@pytest.mark.postgres
async def test_a_statement_with_too_few_parameters_is_given_up_on(pg_url: str) -> None:
    """The driver has no other class for it than for a connection that is closed."""
    async with open_stage(pg_url) as stage:

        @handles(ChargeCard, retry=ONCE)
        async def wrong(command: ChargeCard, session: AsyncSession) -> None:
            assert command.order
            await (await session.connection()).exec_driver_sql("SELECT $1::int", ())

        await stage.start(wrong)
        await stage.send(charge())
        assert (await stage.replies.next()).type == "failed"
        assert "1 argument" in (await stage.dead())[0].detail


async def test_a_cancellation_by_a_library_inside_a_handler_is_a_failure_like_others(stage: Stage) -> None:
    runs: list[int] = []

    @handles(ChargeCard, retry=THRICE)
    async def cancelled_once(command: ChargeCard, context: Context) -> Charged:
        runs.append(context.attempt)
        if context.attempt < 3:
            raise asyncio.CancelledError
        return Charged(charge=command.order)

    await stage.start(cancelled_once)
    await stage.send(charge())
    await stage.pass_delay(1, 5)
    await stage.pass_delay(2, 15)
    assert (await stage.replies.next()).type == "charged"
    assert runs == [1, 2, 3]


class PanicError(BaseException):
    """What a panic in a Rust extension looks like: no Exception."""


@pytest.mark.parametrize("in_session", [False, True])
async def test_a_panic_of_an_extension_costs_its_own_message_only(stage: Stage, in_session: bool) -> None:
    @handles(ChargeCard, retry=ONCE, name="panics")
    async def without_session(command: ChargeCard) -> None:
        if command.order == "bad":
            raise PanicError("slice index starts at 2 but ends at 1")

    @handles(ChargeCard, retry=ONCE, name="panics")
    async def with_session(command: ChargeCard, session: AsyncSession) -> None:
        await session.execute(effects.insert().values(what=command.order))
        if command.order == "bad":
            raise PanicError("slice index starts at 2 but ends at 1")

    handler = with_session if in_session else without_session
    await stage.start(handler)
    await stage.send(charge("bad"))
    assert (await stage.replies.next()).type == "failed"
    assert "slice index" in (await stage.dead())[0].detail
    await stage.send(charge("good"))
    assert (await stage.replies.next()).type == "succeeded"
    await stage.settled(handler)


async def test_an_error_whose_text_cannot_be_stored_is_kept_with_a_text_that_can(stage: Stage) -> None:
    @handles(ChargeCard, retry=ONCE)
    async def strange(command: ChargeCard) -> None:
        raise ValueError(f"NUL \0, a lone surrogate \udcff, {command.order}")

    await stage.start(strange)
    await stage.send(charge())
    reply = await stage.replies.next()  # read by the strict decoder: neither is in it
    assert reply.type == "failed"
    assert b"a lone surrogate" in reply.data
    [letter] = await stage.dead()
    assert "a lone surrogate" in letter.detail
    await stage.settled(strange)


async def test_a_result_of_another_type_is_a_failure_that_says_so(stage: Stage) -> None:
    @handles(ChargeCard, retry=ONCE)
    async def wrong(command: ChargeCard) -> str:
        return command.order

    await stage.start(wrong)
    await stage.send(charge())
    assert (await stage.replies.next()).type == "failed"
    assert "handler wrong returned str; return an Event, a Reply or None" in (await stage.dead())[0].detail


@pytest.mark.parametrize("in_session", [False, True])
async def test_an_outcome_too_large_to_send_is_given_up_on_and_the_saga_is_told(stage: Stage, in_session: bool) -> None:
    @handles(ChargeCard, retry=ONCE, name="verbose")
    async def without_session(command: ChargeCard) -> Charged:
        return Charged(charge=command.order * 100_000)

    @handles(ChargeCard, retry=ONCE, name="verbose")
    async def with_session(command: ChargeCard, session: AsyncSession) -> Charged:
        await session.execute(effects.insert().values(what="too large"))
        return Charged(charge=command.order * 100_000)

    handler = with_session if in_session else without_session
    await stage.start(handler, limits=Limits(body=50_000))
    sent = charge()
    await stage.send(sent)
    reply = await stage.replies.next()
    assert reply.type == "failed"
    assert reply.saga is not None
    assert reply.saga.result is Result.FAILED
    [letter] = await stage.dead()
    assert letter.body == sent.encode()
    assert "send a reference to the data instead" in letter.detail
    assert letter.reason == "too_large"
    assert await stage.effects() == []
    await stage.settled(handler)


async def test_an_outcome_too_large_does_not_spoil_the_commit_of_others(fake: tuple[Stage, FakeBus]) -> None:
    stage, _ = fake
    gate = Gate()

    @handles(ChargeCard, retry=ONCE)
    async def verbose(command: ChargeCard) -> Charged:
        await gate.pass_through(command.order)
        return Charged(charge="x" * (100_000 if command.order == "large" else 1))

    await stage.start(verbose, limits=Limits(body=50_000))
    await stage.send(charge("1"), charge("large"), charge("2"))
    for _ in range(3):
        await gate.next()
    gate.open()
    kinds = sorted([(await stage.replies.next()).type for _ in range(3)])
    assert kinds == ["charged", "charged", "failed"]
    assert len(await stage.dead()) == 1
    await stage.settled(verbose)


async def test_an_outcome_that_no_receiver_could_read_is_given_up_on(stage: Stage) -> None:
    """PostgreSQL cannot store NUL, so receivers refuse it: such a reply would be lost, and its duplicate block all."""

    @handles(ChargeCard, retry=ONCE)
    async def with_nul(command: ChargeCard) -> Charged:
        return Charged(charge="\0" if command.order == "bad" else r"\u0000 in words")

    await stage.start(with_nul)
    bad = charge("bad")
    await stage.send(bad)
    assert (await stage.replies.next()).type == "failed"
    await stage.send(bad)
    assert (await stage.replies.next()).type == "failed"
    await stage.send(charge("good"))
    assert (await stage.replies.next()).data == b'{"charge":"\\\\u0000 in words"}'
    await stage.settled(with_nul)


# Unreadable messages


async def test_unreadable_parts_are_kept_byte_for_byte_and_the_rest_goes_on(stage: Stage) -> None:
    await stage.start(keep)
    good, unknown = charge("good"), charge()
    unknown.type = "card.vanished"
    newer = charge()
    newer.version = 9
    invalid = charge()
    invalid.data = b'{"order":{"secret":"4711"}}'
    parts = [b'{ "specversion" : "0.3" }', unknown.encode(), good.encode(), b"17", newer.encode(), invalid.encode()]
    await stage.send_raw("charge.card", b"[" + b" ,".join(parts) + b"]")

    letters = await stage.dead_letters(5)
    kept = {letter.body: letter.reason for letter in letters}
    assert kept == {
        parts[0]: "malformed",
        parts[1]: "unknown_type",
        parts[3]: "malformed",
        parts[4]: "newer_version",
        parts[5]: "invalid",
    }
    assert all(letter.consumer == "keep" and letter.attempts == 0 for letter in letters)
    assert not any("4711" in letter.detail for letter in letters)
    results = {(await stage.replies.next()).causation_id for _ in range(4)}
    assert results == {unknown.id, newer.id, invalid.id, good.id}
    await stage.settled(keep)
    assert await stage.effects() == ["good"]


@pytest.mark.parametrize("body", [b"", b"\xef\xbb\xbf[]", b"[", b"\0", b"\xff\xfe", b'{"id":NaN}', b"x" * 300_000])
async def test_a_body_that_is_no_json_is_kept_byte_for_byte(stage: Stage, body: bytes) -> None:
    await stage.start(keep)
    await stage.send_raw("charge.card", body)
    await stage.send(charge("good"))
    assert (await stage.replies.next()).type == "charged"
    [letter] = await stage.dead_letters(1)
    assert letter.body == body
    assert letter.reason == ("too_large" if len(body) > 1000 else "malformed")
    await stage.settled(keep)


async def test_headers_that_no_database_can_store_as_they_are_do_not_stop_the_handler(
    fake: tuple[Stage, FakeBus],
) -> None:
    stage, bus = fake
    await stage.start(keep)
    headers = {"na\0me": "va\0lue", "raw": b"\0\xff", "nested": {"deep": ["\0"]}, "number": float("nan"), "flag": True}
    bus.put(keep.queue.name, FakeDelivery(b"nonsense", content_type="text/\0plain", headers=headers))
    [letter] = await stage.dead_letters(1)
    assert letter.body == b"nonsense"
    assert letter.headers["na\\0me"] == "va\\0lue"
    assert letter.headers["raw"] == "\\0\\xff"
    assert letter.headers["flag"] is True
    assert letter.content_type == "text/\\0plain"
    await stage.settled(keep)


# Crashes


@pytest.mark.parametrize("place", ["handler.after_run", "handler.before_commit"])
async def test_a_crash_before_the_commit_leaves_nothing_and_the_message_comes_again(stage: Stage, place: str) -> None:
    runs: list[str] = []

    @handles(ChargeCard)
    async def charge_card(command: ChargeCard) -> Charged:
        runs.append(command.order)
        return Charged(charge=f"run {len(runs)}")

    halt = Halt()
    await stage.start(charge_card)
    with armed(place, halt):
        await stage.send(charge())
        await halt.reached()
        await stage.restart()
    assert await stage.handled() == []
    assert len(stage.replies) == 0

    await stage.start(charge_card)
    assert (await stage.replies.next()).data == b'{"charge":"run 2"}'
    await stage.settled(charge_card)


@pytest.mark.parametrize("in_session", [False, True])
async def test_a_crash_after_the_commit_leaves_a_duplicate_that_is_absorbed(stage: Stage, in_session: bool) -> None:
    runs: list[str] = []

    @handles(ChargeCard, name="once")
    async def without_session(command: ChargeCard) -> Charged:
        runs.append(command.order)
        return Charged(charge=f"run {len(runs)}")

    @handles(ChargeCard, name="once")
    async def with_session(command: ChargeCard, session: AsyncSession) -> Charged:
        runs.append(command.order)
        await session.execute(effects.insert().values(what=command.order))
        return Charged(charge=f"run {len(runs)}")

    handler = with_session if in_session else without_session
    halt = Halt()
    await stage.start(handler)
    with armed("handler.after_commit", halt):
        await stage.send(charge())
        await halt.reached()
        await stage.restart()
    assert len(await stage.handled()) == 1

    await stage.start(handler)
    assert (await stage.replies.next()).data == b'{"charge":"run 1"}'
    await stage.settled(handler)
    assert runs == ["1"]
    assert await stage.effects() == (["1"] if in_session else [])


async def test_an_exception_before_the_commit_rolls_the_effect_back_and_is_retried(stage: Stage) -> None:
    @handles(ChargeCard, retry=THRICE)
    async def keep_it(command: ChargeCard, session: AsyncSession) -> None:
        await session.execute(effects.insert().values(what=command.order))

    await stage.start(keep_it)
    with armed("handler.before_commit", failing(RuntimeError("the disk is on fire"))):
        await stage.send(charge())
        await stage.pass_delay(1, 5)
        assert (await stage.replies.next()).type == "succeeded"
    assert await stage.effects() == ["1"]
    assert len(await stage.handled()) == 1


@pytest.mark.parametrize("place", ["handler.before_commit", "handler.after_commit"])
@pytest.mark.parametrize("in_session", [False, True])
async def test_a_commit_that_a_library_cancels_is_not_forgotten(stage: Stage, place: str, in_session: bool) -> None:
    """Once what had been taken for the commit was lost in memory, and its message stayed unsettled."""

    @handles(ChargeCard, name="cancelled")
    async def without_session(command: ChargeCard) -> Charged:
        return Charged(charge=command.order)

    @handles(ChargeCard, name="cancelled")
    async def with_session(command: ChargeCard, session: AsyncSession) -> Charged:
        await session.execute(effects.insert().values(what=command.order))
        return Charged(charge=command.order)

    handler = with_session if in_session else without_session
    runner = await stage.start(handler)
    with armed(place, failing(asyncio.CancelledError())):
        await stage.send(charge())
        await stage.clock.pass_sleep(DATABASE_PAUSE if in_session else SUPERVISOR_PAUSE)
        assert (await stage.replies.next()).type == "charged"
        await stage.settled(handler)
    assert len(await stage.handled()) == 1
    assert await stage.effects() == (["1"] if in_session else [])
    async with asyncio.timeout(PATIENCE):
        await runner.stop(2 * PATIENCE)


@pytest.mark.parametrize("in_session", [False, True])
async def test_a_database_that_is_away_during_the_commit_is_waited_for(stage: Stage, in_session: bool) -> None:
    runs: list[str] = []

    @handles(ChargeCard, retry=ONCE, name="patient")
    async def without_session(command: ChargeCard) -> Charged:
        runs.append(command.order)
        return Charged(charge=command.order)

    @handles(ChargeCard, retry=ONCE, name="patient")
    async def with_session(command: ChargeCard, session: AsyncSession) -> Charged:
        runs.append(command.order)
        await session.execute(effects.insert().values(what=command.order))
        return Charged(charge=command.order)

    handler = with_session if in_session else without_session
    await stage.start(handler)
    with armed("handler.before_commit", failing(ConnectionResetError("the database went away"), times=3)):
        await stage.send(charge())
        for _ in range(3):
            await stage.clock.pass_sleep(DATABASE_PAUSE)
        assert (await stage.replies.next()).type == "charged"
    await stage.settled(handler)
    assert await stage.dead() == []
    assert len(await stage.handled()) == 1
    assert runs == (["1"] * 4 if in_session else ["1"]), "only what was rolled back is run again"
    assert await stage.effects() == (["1"] if in_session else [])


@pytest.mark.postgres
@pytest.mark.parametrize("in_session", [False, True])
async def test_a_connection_that_the_server_ends_before_the_commit_costs_nothing(pg_url: str, in_session: bool) -> None:
    async with open_stage(pg_url) as stage:

        @handles(ChargeCard, retry=ONCE, name="patient")
        async def without_session(command: ChargeCard) -> Charged:
            return Charged(charge=command.order)

        @handles(ChargeCard, retry=ONCE, name="patient")
        async def with_session(command: ChargeCard, session: AsyncSession) -> Charged:
            await session.execute(effects.insert().values(what=command.order))
            return Charged(charge=command.order)

        async def end_all_others() -> None:
            statement = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND state LIKE 'idle%'"
            )
            if not ended:
                async with transaction(stage.engine) as connection:
                    ended.extend((await connection.execute(text(statement))).all())

        ended: list[object] = []
        handler = with_session if in_session else without_session
        await stage.start(handler)
        with armed("handler.before_commit", end_all_others):
            await stage.send(charge())
            await stage.clock.pass_sleep(DATABASE_PAUSE)
            assert (await stage.replies.next()).type == "charged"
        assert ended
        await stage.settled(handler)
        assert len(await stage.handled()) == 1
        assert await stage.effects() == (["1"] if in_session else [])
        assert await stage.dead() == []


# Resources


async def test_a_handler_gets_what_it_asks_for_and_it_is_cleaned_up_after_each_message(stage: Stage) -> None:
    class Payments:
        def __init__(self, number: int) -> None:
            self.number = number

    life: list[str] = []

    async def make() -> AsyncIterator[Payments]:
        number = len(life) // 2
        life.append(f"made {number}")
        yield Payments(number)
        life.append(f"closed {number}")

    provider = Provider(scope=Scope.REQUEST)
    provider.provide(make, provides=Payments)
    container = make_async_container(provider)

    async def charge_card(command: ChargeCard, payments: Payments, session: AsyncSession) -> Charged:
        await session.execute(effects.insert().values(what=command.order))
        if command.order == "declined":
            raise Declined("no")
        return Charged(charge=str(payments.number))

    charge_card.__annotations__["payments"] = Payments
    handler = handles(ChargeCard, retry=ONCE)(charge_card)
    await stage.start(handler, container=container)
    await stage.send(charge())
    assert (await stage.replies.next()).data == b'{"charge":"0"}'
    await stage.send(charge("declined"))
    assert (await stage.replies.next()).type == "refused"
    await stage.send(charge())
    assert (await stage.replies.next()).data == b'{"charge":"2"}'
    await stage.settled(handler)
    assert life == ["made 0", "closed 0", "made 1", "closed 1", "made 2", "closed 2"]
    await container.close()


async def test_a_resource_that_cannot_be_made_is_a_failure(stage: Stage) -> None:
    class Payments:
        pass

    def make() -> Payments:
        raise ConnectionError("payments are away")

    provider = Provider(scope=Scope.REQUEST)
    provider.provide(make, provides=Payments)
    container = make_async_container(provider)

    async def charge_card(command: ChargeCard, payments: Payments) -> None:
        raise AssertionError(f"called with {command} and {payments}")

    charge_card.__annotations__["payments"] = Payments
    handler = handles(ChargeCard, retry=ONCE)(charge_card)
    await stage.start(handler, container=container)
    await stage.send(charge())
    assert (await stage.replies.next()).type == "failed"
    assert "payments are away" in (await stage.dead())[0].detail
    await container.close()


# Stopping


async def test_stop_finishes_what_runs_and_takes_no_more(stage: Stage) -> None:
    gate = Gate()

    @handles(ChargeCard, concurrency=1)
    async def held(command: ChargeCard) -> Charged:
        await gate.pass_through(command.order)
        return Charged(charge=command.order)

    runner = await stage.start(held)
    await stage.send(charge("running"))
    await gate.next()
    await stage.send(charge("waiting"))
    stopping = asyncio.create_task(runner.stop(PATIENCE))
    await asyncio.sleep(0)
    gate.open()
    await stopping

    assert (await stage.replies.next()).data == b'{"charge":"running"}'
    assert len(await stage.handled()) == 1
    await stage.restart()
    await stage.start(held)
    assert (await stage.replies.next()).data == b'{"charge":"waiting"}'
    await stage.settled(held)


@pytest.mark.parametrize("in_session", [False, True])
async def test_stop_hands_back_what_does_not_end_within_its_grace(stage: Stage, in_session: bool) -> None:
    gate = Gate()
    runs: list[str] = []

    @handles(ChargeCard, name="endless")
    async def without_session(command: ChargeCard) -> Charged:
        runs.append(command.order)
        await gate.pass_through(command.order)
        return Charged(charge=command.order)

    @handles(ChargeCard, name="endless")
    async def with_session(command: ChargeCard, session: AsyncSession) -> Charged:
        runs.append(command.order)
        await session.execute(effects.insert().values(what=command.order))
        await gate.pass_through(command.order)
        return Charged(charge=command.order)

    handler = with_session if in_session else without_session
    runner = await stage.start(handler)
    await stage.send(charge())
    await gate.next()
    await runner.stop(0)
    await runner.stop(0)
    assert await stage.handled() == []
    assert await stage.unsettled(handler) == 1

    gate.open()
    await stage.restart()
    await stage.start(handler)
    assert (await stage.replies.next()).data == b'{"charge":"1"}'
    await stage.settled(handler)
    assert runs == ["1", "1"]
    assert await stage.effects() == (["1"] if in_session else [])


async def test_no_more_messages_run_at_a_time_than_the_handler_allows(fake: tuple[Stage, FakeBus]) -> None:
    stage, bus = fake
    gate = Gate()
    running: list[str] = []
    most: list[int] = []

    @handles(ChargeCard, concurrency=2)
    async def narrow(command: ChargeCard) -> None:
        running.append(command.order)
        most.append(len(running))
        await gate.pass_through(command.order)
        running.remove(command.order)

    await stage.start(narrow)
    bus.put(narrow.queue.name, *(FakeDelivery(bundle_body([charge(str(n)).encode()])) for n in range(6)))
    await gate.next()
    await gate.next()
    gate.open()
    for _ in range(6):
        await stage.replies.next()
    assert max(most) == 2
    await stage.settled(narrow)


# On RabbitMQ


async def test_on_rabbitmq_a_bundle_is_handled_once_and_a_duplicate_is_answered_again(on_rabbitmq: Stage) -> None:
    stage = on_rabbitmq
    await stage.start(keep)
    sent = [charge(str(n)) for n in range(5)]
    await stage.send(*sent)
    first = {(await stage.replies.next()).causation_id for _ in range(5)}
    await stage.send(*sent)
    again = {(await stage.replies.next()).causation_id for _ in range(5)}
    assert first == again == {each.id for each in sent}
    assert sorted(await stage.effects()) == list("01234")


async def test_on_rabbitmq_what_is_unreadable_is_kept_and_the_rest_goes_on(on_rabbitmq: Stage) -> None:
    stage = on_rabbitmq
    await stage.start(keep)
    await stage.send_raw("charge.card", b"[17," + charge("good").encode() + b"]")
    await stage.send_raw("charge.card", b"[{")
    assert (await stage.replies.next()).data == b'{"charge":"c-good"}'
    assert sorted(bodies(await stage.dead_letters(2))) == [b"17", b"[{"]


async def test_on_rabbitmq_a_crash_after_the_commit_leaves_a_duplicate_that_is_absorbed(on_rabbitmq: Stage) -> None:
    stage = on_rabbitmq
    halt = Halt()
    await stage.start(keep)
    with armed("handler.after_commit", halt):
        await stage.send(charge())
        await halt.reached()
        await stage.restart()
    await stage.start(keep)
    assert (await stage.replies.next()).data == b'{"charge":"c-1"}'
    assert await stage.effects() == ["1"]


async def test_on_rabbitmq_what_does_not_end_within_the_grace_is_delivered_again(on_rabbitmq: Stage) -> None:
    stage = on_rabbitmq
    gate = Gate()

    @handles(ChargeCard)
    async def endless(command: ChargeCard) -> Charged:
        await gate.pass_through(command.order)
        return Charged(charge=command.order)

    runner = await stage.start(endless)
    await stage.send(charge())
    await gate.next()
    await runner.stop(0)
    gate.open()
    await stage.restart()
    await stage.start(endless)
    assert (await stage.replies.next()).data == b'{"charge":"1"}'
