"""The fence: whatever overtakes what, a step that was undone is not done afterwards."""

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from events.derive import derive_id
from events.envelope import Direction, Envelope, Result, SagaLink
from handlers import Declined, Handler, Retry, handles
from tests.support.flows import PATIENCE, ChargeCard, Charged, RefundCard, Stage, effects, enveloped, open_stage

ONCE = Retry(attempts=1)


@pytest.fixture(params=["embedded", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    url = request.getfixturevalue("pg_url" if request.param == "postgres" else "sqlite_url")
    async with open_stage(url, embedded=request.param == "embedded") as opened:
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


class Outside:
    """A third party, and handlers that call it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.called = asyncio.Event()
        self.answer = asyncio.Event()
        self.answer.set()

    @property
    def handlers(self) -> tuple[Handler, Handler]:
        @handles(ChargeCard, name="charge_outside", retry=ONCE)
        async def charge(command: ChargeCard) -> Charged:
            self.calls.append("do")
            self.called.set()
            await self.answer.wait()
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
        assert await answer(stage) == (Direction.DO, Result.DECLINED)
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
