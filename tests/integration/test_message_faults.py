"""What messages can be: repeated, out of order, late, unreadable, too large, unknown. Numbers of the list of faults."""

import asyncio
import json
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from events.codec import Limits, bundle_body
from events.database import transaction
from events.derive import derive_id
from events.envelope import Direction, Envelope, Result, SagaLink
from handlers import Context, Handler, Retry, handles
from handlers.letters import Query
from handlers.replay import DeadLetters
from handlers.tables import inbox
from tests.support.flows import (
    PATIENCE,
    ChargeCard,
    Charged,
    FakeBus,
    FakeDelivery,
    OrderPlaced,
    RefundCard,
    Stage,
    effects,
    enveloped,
    link,
    open_stage,
    until,
)


@pytest.fixture(params=["embedded", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    url = request.getfixturevalue("pg_url" if request.param == "postgres" else "sqlite_url")
    async with open_stage(url, embedded=request.param == "embedded") as opened:
        yield opened


def keeper(message: type[ChargeCard | RefundCard] = ChargeCard) -> Handler:
    async def keep(command: ChargeCard, session: AsyncSession) -> Charged:
        await session.execute(effects.insert().values(what=f"{command.message_type} {command.order}"))
        return Charged(charge=command.order)

    keep.__annotations__["command"] = message
    return handles(message, name=message.__name__.lower())(keep)


def charge(order: str = "1") -> Envelope:
    return enveloped(ChargeCard(order=order), saga=link())


async def test_f44_a_message_that_comes_a_thousand_times_has_one_effect_and_one_answer(stage: Stage) -> None:
    await stage.start(keeper())
    sent = charge()
    await stage.send(*[sent] * 500)
    await stage.send(*[sent] * 500)
    replies = [await stage.replies.next() for _ in range(1000)]
    assert {(reply.id, reply.data) for reply in replies} == {(replies[0].id, b'{"charge":"1"}')}
    assert await stage.effects() == ["charge.card 1"]
    assert len(await stage.handled()) == 1


async def test_f44_the_same_message_in_two_processes_has_one_effect(pg_url: str) -> None:
    async with open_stage(pg_url) as one, open_stage(pg_url) as other:
        for stage in (one, other):
            await stage.start(keeper())
        sent = [charge(str(number)) for number in range(50)]
        await asyncio.gather(one.send(*sent), other.send(*reversed(sent)))
        for stage in (one, other):
            for _ in sent:
                await stage.replies.next()
        assert len(await one.effects()) == 50


async def test_f45_what_is_undone_before_it_is_done_is_never_done(stage: Stage) -> None:
    stage.commands = {"charge.card", "refund.card"}
    await stage.start(keeper(ChargeCard), keeper(RefundCard))
    saga = uuid4()
    command = derive_id(saga, "charge", "do", 1)
    undo = SagaLink(saga, "charge", Direction.UNDO, 1, undoes=command, undoes_type="charge.card")
    await stage.send(enveloped(RefundCard(order="1"), saga=undo))
    first = await stage.replies.next()
    assert first.saga is not None
    assert first.saga.result is Result.SUCCEEDED
    do = enveloped(ChargeCard(order="1"), id=str(command), saga=SagaLink(saga, "charge", Direction.DO, 1))
    await stage.send(do)
    second = await stage.replies.next()
    assert second.saga is not None
    assert second.saga.result is Result.DECLINED
    assert await stage.effects() == []


async def test_f46_a_message_that_comes_again_after_days_is_answered_and_not_run(stage: Stage) -> None:
    await stage.start(keeper())
    sent = charge()
    await stage.send(sent)
    first = await stage.replies.next()
    stage.clock.advance(7 * 24 * 3600)
    await stage.send(sent)
    again = await stage.replies.next()
    assert (again.id, again.data) == (first.id, first.data)
    assert await stage.effects() == ["charge.card 1"]


GOOD = {"specversion": "1.0", "id": "i", "source": "/s", "type": "charge.card", "data": {"order": "1"}}
TEXT = json.dumps(GOOD)


@pytest.mark.parametrize(
    ("body", "encoding", "reason"),
    [
        (TEXT[:-5].encode(), None, "malformed"),
        (b"hello", None, "malformed"),
        (b"\xff\xfe", None, "malformed"),
        (b"", None, "malformed"),
        (b"[]", None, "malformed"),
        (b"7", None, "malformed"),
        (b"\xef\xbb\xbf" + TEXT.encode(), None, "malformed"),
        (TEXT.replace('"1"', "NaN").encode(), None, "malformed"),
        (TEXT.replace('"1"', "1e999").encode(), None, "malformed"),
        (TEXT.replace('"1"', "-Infinity").encode(), None, "malformed"),
        (TEXT.replace('"1"', '"1", "order": "2"').encode(), None, "malformed"),
        (TEXT.replace('"1"', '"\\u0000"').encode(), None, "malformed"),
        (TEXT.replace('"1"', '"\\ud800"').encode(), None, "malformed"),
        (TEXT.replace('"1"', "[" * 100_000).encode(), None, "malformed"),
        (TEXT.replace('"1"', "9" * 5000).encode(), None, "malformed"),
        (TEXT.encode(), "gzip", "malformed"),
        (TEXT.replace('"1"', "7").encode(), None, "invalid"),
        (TEXT.replace('{"order": "1"}', "{}").encode(), None, "invalid"),
        (TEXT.replace("charge.card", "no.such.type").encode(), None, "unknown_type"),
    ],
)
async def test_f48_what_cannot_be_read_is_kept_byte_for_byte_and_the_handler_goes_on(
    sqlite_url: str, body: bytes, encoding: str | None, reason: str
) -> None:
    async with open_stage(sqlite_url) as stage:
        assert isinstance(stage.bus, FakeBus)
        handler = keeper()
        await stage.start(handler)
        stage.bus.put(handler.queue.name, FakeDelivery(body, content_encoding=encoding, content_type=None))
        [letter] = await stage.dead_letters(1)
        assert (letter.body, letter.reason) == (body, reason)
        await stage.send(charge("good"))
        assert (await stage.replies.next()).type == "charged"
        await stage.settled(handler)
        assert await stage.waiting() == []


@pytest.mark.parametrize("excess", [0, 1])
@pytest.mark.parametrize("of", ["body", "headers"])
async def test_f49_one_byte_more_than_allowed_is_too_much(sqlite_url: str, excess: int, of: str) -> None:
    async with open_stage(sqlite_url) as stage:
        assert isinstance(stage.bus, FakeBus)
        handler = keeper()
        shortest = enveloped(ChargeCard(order=""))  # of no saga: a reply would have to fit as well
        limits = Limits(body=2000, headers=100)
        more = limits.body - len(bundle_body([shortest.encode()])) + (excess if of == "body" else 0)
        body = bundle_body([enveloped(ChargeCard(order="x" * more), id=shortest.id).encode()])
        headers = {"h": "x" * (99 + (excess if of == "headers" else 0))}
        await stage.start(handler, limits=limits)
        stage.bus.put(handler.queue.name, FakeDelivery(body, headers=headers))
        await stage.settled(handler)
        letters = await stage.dead()
        assert [(letter.reason, letter.body) for letter in letters] == ([("too_large", body)] if excess else [])
        assert len(await stage.effects()) == 1 - excess


async def test_f51_a_message_of_a_newer_version_is_kept_until_the_code_is_there(stage: Stage) -> None:
    class Placed(OrderPlaced, type="order.placed", version=2):
        currency: str

    shown: list[str] = []

    @handles(OrderPlaced, name="show")
    async def show(event: OrderPlaced) -> None:
        shown.append(f"old {event.order}")

    @handles(Placed, name="show")
    async def show_newer(event: Placed) -> None:
        shown.append(f"{event.order} in {event.currency}")

    await stage.start(show)
    fake = enveloped(Placed(order="1", currency="EUR"))
    await stage.bus.declare([show.queue])
    await stage.send(fake, exchange=show.queue.bindings[0].exchange)
    [letter] = await stage.dead_letters(1)
    assert (letter.reason, shown) == ("newer_version", [])
    await stage.restart()
    await stage.start(show_newer)
    letters = DeadLetters(stage.engine, clock=stage.clock, ids=stage.ids)
    assert [each.refused async for each in letters.replay(Query(reason="newer_version"), by="ada", why="deployed")] == [
        None
    ]
    await stage.clock.asleep(0.4)
    stage.clock.advance(1)

    async def is_shown() -> bool:
        return bool(shown)

    await until(is_shown)
    assert shown == ["1 in EUR"]


async def test_f52_an_id_that_comes_with_other_content_is_a_dead_letter(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """The first content counts, and answers; the second has no effect, is kept, and is not replayed."""
    await stage.start(keeper())
    first, second = charge("1"), charge("2")
    second.id, second.saga = first.id, first.saga
    await stage.send(first)
    assert (await stage.replies.next()).data == b'{"charge":"1"}'
    await stage.send(second)
    assert (await stage.replies.next()).data == b'{"charge":"1"}'
    await stage.send(first)
    assert (await stage.replies.next()).data == b'{"charge":"1"}'
    assert await stage.effects() == ["charge.card 1"]
    [letter] = await stage.dead()
    assert (letter.reason, letter.body) == ("conflict", second.encode())
    assert "handler.conflict" in {getattr(record, "action", "") for record in caplog.records}
    letters = DeadLetters(stage.engine, clock=stage.clock, ids=stage.ids)
    [planned] = [planned async for planned in letters.replay(Query(), by="ada", why="a test")]
    assert planned.refused is not None
    assert "id of its own" in planned.refused


async def test_f52_an_id_that_comes_with_other_content_while_the_first_waits_is_a_dead_letter(stage: Stage) -> None:
    failing = True

    @handles(ChargeCard, retry=Retry(quick=0, first=10, jitter="none"))
    async def charge_card(command: ChargeCard) -> Charged:
        if failing:
            raise OSError
        return Charged(charge=command.order)

    await stage.start(charge_card)
    first, second = charge("1"), charge("2")
    second.id, second.saga = first.id, first.saga
    await stage.send(first)
    await stage.delayed(1)
    await stage.send(second)
    [letter] = await stage.dead_letters(1)
    assert (letter.reason, letter.body) == ("conflict", second.encode())
    failing = False
    stage.clock.advance(10)
    assert (await stage.replies.next()).data == b'{"charge":"1"}'


async def test_f53_after_the_inbox_row_is_gone_a_business_key_still_guards_the_effect(stage: Stage) -> None:
    """Who deletes from the inbox too early makes a duplicate run again; the key that a handler hands on is the same."""
    keys: list[str] = []

    @handles(ChargeCard)
    async def charge_card(command: ChargeCard, context: Context) -> Charged:
        keys.append(context.idempotency_key)
        return Charged(charge=command.order)

    await stage.start(charge_card)
    sent = charge()
    await stage.send(sent)
    await stage.replies.next()
    async with transaction(stage.engine) as connection:
        await connection.execute(inbox.delete())
    await stage.send(sent)
    await stage.replies.next()
    assert len(keys) == 2
    assert len(set(keys)) == 1


@pytest.mark.postgres
async def test_a_query_that_hangs_is_cancelled_and_leaves_no_connection_broken(pg_url: str) -> None:
    @handles(ChargeCard, retry=Retry(attempts=1), timeout=0.3, concurrency=20)
    async def hang(command: ChargeCard, session: AsyncSession) -> Charged:
        await session.execute(effects.insert().values(what=command.order))
        if command.order.startswith("bad"):
            await session.execute(text("SELECT pg_sleep(60)"))
        return Charged(charge=command.order)

    async with open_stage(pg_url) as stage:
        await stage.start(hang)
        await stage.send(*(charge(f"bad {number}") for number in range(30)))
        letters = await stage.dead_letters(30)
        assert {letter.error_type for letter in letters} == {"TimeoutError"}
        for _ in range(30):
            await stage.replies.next()
        await stage.send(*(charge(str(number)) for number in range(30)))
        async with asyncio.timeout(PATIENCE):
            assert {(await stage.replies.next()).type for _ in range(30)} == {"charged"}
        assert len(await stage.effects()) == 30

        async def nobody_sleeps() -> bool:
            async with transaction(stage.engine) as connection:
                statement = (
                    "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%pg_sleep(60)'"
                )
                return not (await connection.execute(text(statement))).scalar_one()

        await until(nobody_sleeps)
        status = stage.engine.pool.status()
        assert "Current Checked out connections: 0" in status, status
