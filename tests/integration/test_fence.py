"""The fence: whatever overtakes what, a step that was undone is not done afterwards."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from uuid import UUID, uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from events.codec import bundle_body
from events.derive import derive_id
from events.envelope import Direction, Envelope, Result, SagaLink
from handlers import Declined, Handler, Retry, handles
from tests.support.flows import (
    PATIENCE,
    ChargeCard,
    Charged,
    FakeBus,
    FakeDelivery,
    RefundCard,
    Stage,
    effects,
    enveloped,
    open_stage,
)

ONCE = Retry(attempts=1)
LATER = 5  # seconds


@pytest.fixture(
    params=[
        "embedded",
        "sqlite",
        pytest.param("postgres", marks=pytest.mark.postgres),
        pytest.param("rabbitmq", marks=[pytest.mark.postgres, pytest.mark.rabbitmq]),
    ]
)
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    """On RabbitMQ together with PostgreSQL; else the bus is the embedded one, or in memory."""
    url = request.getfixturevalue("sqlite_url" if request.param in ("embedded", "sqlite") else "pg_url")
    amqp_url = request.getfixturevalue("amqp_url") if request.param == "rabbitmq" else None
    async with open_stage(url, embedded=request.param == "embedded", amqp_url=amqp_url) as opened:
        opened.commands = {"charge.card"}
        yield opened


def do(saga: UUID) -> Envelope:
    command = str(derive_id(saga, "charge", "do", 1))
    return enveloped(ChargeCard(order="1"), id=command, saga=SagaLink(saga, "charge", Direction.DO, 1))


def undo(saga: UUID, attempt: int = 1, undoes_type: str = "charge.card") -> Envelope:
    link = SagaLink(
        saga,
        "charge",
        Direction.UNDO,
        attempt,
        undoes=derive_id(saga, "charge", "do", 1),
        undoes_type=undoes_type,
    )
    return enveloped(RefundCard(order="1"), id=str(derive_id(saga, "charge", "undo", attempt)), saga=link)


@handles(ChargeCard, name="charge_inside", retry=ONCE)
async def charge_inside(command: ChargeCard, session: AsyncSession) -> Charged:
    await session.execute(effects.insert().values(what="do"))
    return Charged(charge=command.order)


@handles(RefundCard, name="refund_inside", retry=ONCE)
async def refund_inside(_: RefundCard, session: AsyncSession) -> None:
    await session.execute(effects.insert().values(what="undo"))


class LostAnswerError(Exception):
    """The third party has done it, and we have not heard of it."""


class Outside:
    """A third party, and handlers that call it.

    Attributes:
        calls: what it was asked for.
        called: set when it is asked to do something.
        answer: it answers while this is set.
        lost: how many of its answers are lost.
    """

    def __init__(self, lost: int = 0) -> None:
        self.calls: list[str] = []
        self.called = asyncio.Event()
        self.answer = asyncio.Event()
        self.answer.set()
        self.lost = lost

    async def is_called(self) -> None:
        """Return when it is asked to do something that it has not been asked for yet."""
        async with asyncio.timeout(PATIENCE):
            await self.called.wait()
        self.called.clear()

    @property
    def handlers(self) -> tuple[Handler, Handler]:
        @handles(ChargeCard, name="charge_outside", retry=Retry(quick=0, first=LATER, factor=1, jitter="none"))
        async def charge(command: ChargeCard) -> Charged:
            self.calls.append("do")
            self.called.set()
            await self.answer.wait()
            if self.lost:
                self.lost -= 1
                raise LostAnswerError
            if command.order == "declined":
                raise Declined("no")
            return Charged(charge=command.order)

        @handles(RefundCard, name="refund_outside", retry=ONCE)
        async def refund(_: RefundCard) -> None:
            self.calls.append("undo")

        return charge, refund


async def answer(stage: Stage) -> tuple[Direction, Result | None]:
    reply = await stage.replies.next()
    assert reply.saga is not None
    return reply.saga.direction, reply.saga.result


async def test_f45_an_undo_that_comes_first_succeeds_without_running_and_bars_its_command(stage: Stage) -> None:
    saga = uuid4()
    await stage.start(charge_inside)
    await stage.start(refund_inside)
    await stage.send(undo(saga))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    for _ in range(2):  # also when it comes again
        await stage.send(do(saga))
        assert await answer(stage) == (Direction.DO, Result.DECLINED)
    assert await stage.effects() == []


@pytest.mark.parametrize("fenced", [True, False], ids=["in place", "taken away"])
async def test_f45_only_the_fence_keeps_a_command_from_running_after_its_undo(database_url: str, fenced: bool) -> None:
    """Without it the inbox hides nothing: the two are different messages."""
    saga = uuid4()
    async with open_stage(database_url) as stage:
        stage.commands = {"charge.card"} if fenced else set()
        await stage.start(charge_inside)
        await stage.start(refund_inside)
        for message in (undo(saga), do(saga), do(saga)):
            await stage.send(message)
            await answer(stage)
        with nullcontext() if fenced else pytest.raises(AssertionError, match=r"^I4: "):
            assert await stage.effects() == [], "I4: it was undone, and is done"


async def test_an_undo_of_what_was_done_runs(stage: Stage) -> None:
    saga = uuid4()
    await stage.start(charge_inside)
    await stage.start(refund_inside)
    await stage.send(do(saga))
    assert await answer(stage) == (Direction.DO, Result.SUCCEEDED)
    await stage.send(undo(saga))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    assert sorted(await stage.effects()) == ["do", "undo"]


async def test_a_second_attempt_of_an_undo_has_nothing_to_undo_either(stage: Stage) -> None:
    saga = uuid4()
    await stage.start(charge_inside)
    await stage.start(refund_inside)
    for attempt in (1, 2):
        await stage.send(undo(saga, attempt))
        assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    assert await stage.effects() == []


async def test_an_undo_of_a_command_that_somebody_else_handles_always_runs(stage: Stage) -> None:
    """Whether it was executed is written in another database."""
    await stage.start(refund_inside)
    await stage.send(undo(uuid4(), undoes_type="charge.elsewhere"))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    assert await stage.effects() == ["undo"]


async def test_a_command_that_is_overtaken_while_it_calls_a_third_party_says_what_it_did_and_can_be_undone(
    stage: Stage,
) -> None:
    """The call cannot be taken back by a rollback: its success comes late, and the saga undoes it once more."""
    saga, outside = uuid4(), Outside()
    charge, refund = outside.handlers
    outside.answer.clear()
    await stage.start(charge)
    await stage.start(refund)
    await stage.send(do(saga))
    async with asyncio.timeout(PATIENCE):
        await outside.called.wait()
    await stage.send(undo(saga))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    assert outside.calls == ["do"]
    outside.answer.set()
    assert await answer(stage) == (Direction.DO, Result.SUCCEEDED)
    await stage.send(undo(saga, attempt=2))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    assert outside.calls == ["do", "undo"]
    await stage.send(do(saga))
    assert await answer(stage) == (Direction.DO, Result.SUCCEEDED), "the recorded reply"
    assert outside.calls == ["do", "undo"]


async def test_an_undo_of_what_was_tried_in_vain_runs_and_calls_the_next_tries_off(stage: Stage) -> None:
    """The third party may have done it: a lost answer is no proof that it has not."""
    saga, outside = uuid4(), Outside(lost=1)
    charge, refund = outside.handlers
    await stage.start(charge)
    await stage.start(refund)
    await stage.send(do(saga))
    await stage.delayed(1)
    await stage.send(undo(saga))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    assert outside.calls == ["do", "undo"]
    assert await stage.waiting() == []
    await stage.send(do(saga))
    assert await answer(stage) == (Direction.DO, Result.DECLINED), "a copy that comes later has not been tried"
    await stage.send(undo(saga, attempt=2))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    assert outside.calls == ["do", "undo", "undo"], "an undo that is asked for anew runs, too"


@pytest.mark.parametrize("lost", [0, 1])
async def test_an_undo_of_what_is_tried_once_more_runs_and_what_comes_of_the_try_is_undone_again(
    stage: Stage, lost: int
) -> None:
    """The effect of the try that runs may come after the undo."""
    saga, outside = uuid4(), Outside(lost=1 + lost)
    charge, refund = outside.handlers
    await stage.start(charge)
    await stage.start(refund)
    await stage.send(do(saga))
    await outside.is_called()
    outside.answer.clear()
    await stage.pass_delay(1, LATER)
    await outside.is_called()
    await stage.send(undo(saga))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    assert outside.calls == ["do", "do", "undo"]
    outside.answer.set()
    if lost:
        await stage.pass_delay(2, LATER)
    assert await answer(stage) == (Direction.DO, Result.FAILED if lost else Result.SUCCEEDED)
    assert await stage.waiting() == []
    await stage.send(undo(saga, attempt=2))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    assert outside.calls == ["do", "do", "undo", "undo"]


async def test_a_command_that_is_overtaken_in_its_first_try_and_fails_is_told_so_and_undone(stage: Stage) -> None:
    """The undo has found no trace of it. It is not tried again, but its saga must not take it for never done."""
    saga, outside = uuid4(), Outside(lost=1)
    charge, refund = outside.handlers
    outside.answer.clear()
    await stage.start(charge)
    await stage.start(refund)
    await stage.send(do(saga))
    await outside.is_called()
    await stage.send(undo(saga))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    assert outside.calls == ["do"]
    outside.answer.set()
    await stage.pass_delay(1, LATER)
    assert await answer(stage) == (Direction.DO, Result.FAILED)
    await stage.send(undo(saga, attempt=2))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    assert outside.calls == ["do", "undo"]
    assert await stage.waiting() == []


async def test_a_command_that_is_overtaken_in_a_process_that_dies_is_told_to_have_failed_and_undone(
    stage: Stage,
) -> None:
    saga, outside = uuid4(), Outside()
    charge, refund = outside.handlers
    outside.answer.clear()
    await stage.start(charge)
    await stage.start(refund)
    await stage.send(do(saga))
    await outside.is_called()
    await stage.send(undo(saga))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    await stage.restart()
    await stage.start(charge)
    await stage.start(refund)
    assert await answer(stage) == (Direction.DO, Result.FAILED)
    await stage.send(undo(saga, attempt=2))
    assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
    assert outside.calls == ["do", "undo"]


async def test_a_late_success_is_told_although_another_copy_was_told_to_have_failed(database_url: str) -> None:
    """A broken connection gives a command to a second process while the first one still tries it."""
    saga, outside = uuid4(), Outside()
    charge, refund = outside.handlers
    outside.answer.clear()
    async with open_stage(database_url) as stage:
        stage.commands = {"charge.card"}
        assert isinstance(stage.bus, FakeBus)
        await stage.start(charge)
        await stage.start(refund)
        await stage.send(do(saga))
        await outside.is_called()
        await stage.send(undo(saga))
        assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
        await stage.start(charge)  # the second process
        stage.bus.put(charge.queue.name, FakeDelivery(bundle_body([do(saga).encode()]), redelivered=True))
        assert await answer(stage) == (Direction.DO, Result.FAILED)
        await stage.send(undo(saga, attempt=2))
        assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
        outside.answer.set()
        assert await answer(stage) == (Direction.DO, Result.SUCCEEDED)
        await stage.send(undo(saga, attempt=3))
        assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
        assert outside.calls == ["do", "undo", "undo"]


@pytest.mark.postgres
async def test_a_command_that_is_overtaken_in_its_own_transaction_is_rolled_back(pg_url: str) -> None:
    """Both work at once, on a database that lets them."""
    held, going = asyncio.Event(), asyncio.Event()

    @handles(ChargeCard, name="charge_slowly", retry=ONCE)
    async def charge_slowly(command: ChargeCard, session: AsyncSession) -> Charged:
        await session.execute(effects.insert().values(what="do"))
        held.set()
        await going.wait()
        return Charged(charge=command.order)

    async with open_stage(pg_url) as stage:
        stage.commands = {"charge.card"}
        saga = uuid4()
        await stage.start(charge_slowly)
        await stage.start(refund_inside)
        await stage.send(do(saga))
        async with asyncio.timeout(PATIENCE):
            await held.wait()
        await stage.send(undo(saga))
        assert await answer(stage) == (Direction.UNDO, Result.SUCCEEDED)
        going.set()
        assert await answer(stage) == (Direction.DO, Result.FAILED), "it may have called somebody, too"
        assert await stage.effects() == []


async def test_a_thousand_commands_and_their_undos_in_any_order_leave_nothing_done(stage: Stage) -> None:
    """I4: what is undone first is never done; what is done first is undone."""
    await stage.start(charge_inside)
    await stage.start(refund_inside)
    sagas = [uuid4() for _ in range(100)]
    await stage.send(*(message for saga in sagas for message in (undo(saga), do(saga), do(saga))))
    results = [await answer(stage) for _ in range(300)]
    assert results.count((Direction.UNDO, Result.SUCCEEDED)) == 100
    done = await stage.effects()
    assert done.count("do") == done.count("undo")
