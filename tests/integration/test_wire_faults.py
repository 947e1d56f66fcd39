"""A wire that is cut at the worst moment: what has happened on the other side is found out, not guessed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from yarl import URL

from events.database import transaction
from events.errors import BusClosedError
from events.failpoints import armed
from events.outbox import Outbound, route
from handlers import Handler, handles
from tests.support.flows import ChargeCard, Charged, Stage, effects, enveloped, link, open_stage, until
from tests.support.proxy import Proxy, Way
from tests.support.rabbitmq import wire

MESSAGES = 20


class Keeper:
    """A handler that leaves an effect, in its own transaction or in a third party's memory."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def in_transaction(self) -> Handler:
        @handles(ChargeCard, name="charge_card")
        async def charge_card(command: ChargeCard, session: AsyncSession) -> Charged:
            self.calls.append(command.order)
            await session.execute(effects.insert().values(what=command.order))
            return Charged(charge=command.order)

        return charge_card

    def outside(self) -> Handler:
        @handles(ChargeCard, name="charge_card")
        async def charge_card(command: ChargeCard) -> Charged:
            self.calls.append(command.order)
            return Charged(charge=command.order)

        return charge_card


@pytest.fixture
async def observer(pg_url: str) -> AsyncIterator[Stage]:
    """Looks at the database past the proxy."""
    async with open_stage(pg_url) as stage:
        yield stage


async def all_replies(stage: Stage, count: int) -> set[str]:
    """Wait for replies with `count` different ids while time goes on, however often each comes; return the ids."""
    ids: set[str] = set()

    async def enough() -> bool:
        stage.clock.advance(0.2)
        while len(stage.replies):
            ids.add((await stage.replies.next()).id)
        return len(ids) >= count

    await until(enough)
    return ids


@pytest.mark.postgres
@pytest.mark.parametrize("in_transaction", [True, False], ids=["in its transaction", "with others"])
async def test_f3_a_commit_whose_answer_is_lost_is_not_repeated(
    pg_url: str, observer: Stage, in_transaction: bool
) -> None:
    """The commit has reached the database, its answer has not reached us: the inbox knows."""
    keeper, proxy = Keeper(), Proxy(URL(pg_url))
    async with proxy.running() as url, open_stage(url) as stage:
        await stage.start(keeper.in_transaction() if in_transaction else keeper.outside())

        answers: list[asyncio.Queue[asyncio.Event]] = []

        async def watch() -> None:
            if not answers:
                answers.append(proxy.watch_answers())

        with armed("handler.before_commit", watch):
            await stage.send(enveloped(ChargeCard(order="1"), saga=link()))

            async def is_watching() -> bool:
                return bool(answers)

            await until(is_watching)
            while True:
                may_pass = await answers[0].get()
                if await observer.handled():  # this is the answer to the commit, or one after it
                    break
                may_pass.set()
            assert len(stage.replies) == 0
            proxy.cut()
        assert len(await all_replies(stage, 1)) == 1
        assert keeper.calls == ["1"]
        if in_transaction:
            assert await observer.effects() == ["1"]


async def write_all(stage: Stage) -> None:
    """Put messages into the outbox that go out one by one."""
    sent = [enveloped(ChargeCard(order=f"{number} " + "x" * 1000), saga=link()) for number in range(MESSAGES)]
    async with transaction(stage.engine) as connection:
        outbound = [Outbound(each, route(ChargeCard(order="")), 1) for each in sent]
        after_commit = await stage.outbox.write(connection, outbound, ())
    after_commit()


@pytest.mark.rabbitmq
async def test_f7_messages_whose_confirms_are_lost_are_published_again_and_absorbed(
    amqp_url: str, sqlite_url: str
) -> None:
    keeper, proxy = Keeper(), Proxy(URL(amqp_url))
    handler = keeper.in_transaction()
    async with (
        proxy.running() as url,
        open_stage(sqlite_url, amqp_url=url) as stage,
        wire(amqp_url) as channel,
    ):
        await stage.bus.declare([handler.queue])

        async def lose_the_confirms() -> None:
            proxy.swallow(Way.TO_CLIENT)

        async def are_there() -> bool:
            queue = await channel.declare_queue(f"saga.{handler.queue.name}", passive=True)
            return queue.declaration_result.message_count == MESSAGES

        with armed("relay.before_publish", lose_the_confirms):
            await write_all(stage)
            await until(are_there)
        assert len(await stage.unsent()) == MESSAGES, "nothing is counted as sent without its confirm"
        proxy.cut()

        async def is_back() -> bool:
            with suppress(BusClosedError):
                await stage.bus.declare([handler.queue])
                return True
            return False

        await until(is_back)
        await stage.start(handler)
        assert len(await all_replies(stage, MESSAGES)) == MESSAGES

        async def are_absorbed() -> bool:
            stage.clock.advance(0.2)
            queue = await channel.declare_queue(f"saga.{handler.queue.name}", passive=True)
            return await stage.unsent() == [] and queue.declaration_result.message_count == 0

        await until(are_absorbed)
        assert len(await stage.effects()) == len(keeper.calls) == MESSAGES


@pytest.mark.rabbitmq
async def test_f9_a_connection_that_ends_with_messages_in_flight_loses_none_of_them(
    amqp_url: str, sqlite_url: str
) -> None:
    keeper, proxy = Keeper(), Proxy(URL(amqp_url))
    async with proxy.running() as url, open_stage(sqlite_url, amqp_url=url) as stage:
        await stage.start(keeper.in_transaction())
        is_cut = False

        async def cut_half_way() -> None:
            nonlocal is_cut
            if not is_cut:
                is_cut = True
                proxy.cut_after(MESSAGES * 1000 // 2, Way.TO_BROKER)

        with armed("relay.before_publish", cut_half_way):
            await write_all(stage)

            async def are_handled() -> bool:
                stage.clock.advance(0.2)
                return len(await stage.effects()) == MESSAGES and await stage.unsent() == []

            await until(are_handled)
        assert is_cut
        assert len(set(keeper.calls)) == len(keeper.calls) == MESSAGES
