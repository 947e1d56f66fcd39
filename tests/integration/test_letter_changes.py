"""What operators do with dead letters: recorded, in order, never twice, whoever else is at it."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic_core import from_json
from sqlalchemy import update

from events.bus import Address, Exchange
from events.codec import STRUCTURED_TYPE, Limits, Readable, bundle_body, read_body
from events.database import transaction
from events.dead_letters import DeadLetter, bury
from events.envelope import Envelope
from events.errors import ConfigurationError, UnroutableError
from events.intake import Intake
from events.tables import dead_letter, dead_letter_change, outbox
from events.unroutable import unroutable_letter
from handlers.inbox import OF_SAGAS
from handlers.letters import DISCARDED, EDITED, REPLAYED, Letter, Query
from handlers.retries import Waiting
from handlers.tables import handler_process, inbox, retry
from tests.support.flows import START, FakeDelivery, Stage, count_rows, open_stage, until
from tests.support.letters import ALL, Service, letters_of, oldest_first, planned, replayed, undo


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    url = request.getfixturevalue("pg_url" if request.param == "postgres" else "sqlite_url")
    async with open_stage(url) as opened:
        await opened.retries.clock.calibrate()
        yield opened


async def dead(
    stage: Stage,
    *bodies: Envelope | bytes,
    consumer: str = "refund_card",
    reason: str = "failed",
    delivered: dict[str, Any] | None = None,
) -> list[Letter]:
    """Make letters of messages that nobody has seen handled; return them in order."""
    before = {letter.id for letter in await letters_of(stage).find(Query(status=None), limit=10_000)}
    raw = [body.encode() if isinstance(body, Envelope) else body for body in bodies]
    items = [Intake(Limits()).read(FakeDelivery(each, **(delivered or {})))[0] for each in raw]
    async with transaction(stage.engine) as connection:
        letters = [DeadLetter(item, consumer, reason, "no refund", error_type="ValueError") for item in items]
        await bury(connection, letters, ids=stage.ids, now=stage.retries.clock.now())
    found = await letters_of(stage).find(Query(status=None), limit=10_000)
    return sorted((letter for letter in found if letter.id not in before), key=lambda letter: letter.id)


async def rows(stage: Stage) -> set[UUID | None]:
    return {row.dead_letter_id for row in await stage.waiting()}


# The record


async def test_who_has_done_what_with_a_letter_when_and_why_is_kept_for_good(stage: Stage) -> None:
    """What was replayed and died again has lost who had replayed it, and why, and of what it had died before."""
    service = Service()
    await stage.start(service.handler)
    await stage.send(undo("typo"))
    [row] = await stage.dead_letters(1)
    stage.clock.advance(1)
    letters = letters_of(stage, service.handler)
    await letters.edit(row.id, data=b'{"order":"1"}', by="ada", why="a typing error")
    await letters.edit(row.id, data=b'{"order":"2"}', by="bob", why="another one")
    await replayed(letters, by="cyd", why="mended")
    stage.clock.advance(1)

    async def dead_again() -> bool:
        return (await letters.get(row.id)).status == "dead"

    await until(dead_again)
    await letters.discard(ALL, by="dan", why="refunded by hand")
    changes = await letters.changes(row.id)
    assert [(each.act, each.changed_by, each.reason) for each in changes] == [
        ("died", "refund_card", "failed: ValueError: no refund for order typo"),
        (EDITED, "ada", "a typing error"),
        (EDITED, "bob", "another one"),
        (REPLAYED, "cyd", "mended"),
        (DISCARDED, "dan", "refunded by hand"),
    ]
    assert [each.body and from_json(each.body)["data"]["order"] for each in changes] == [
        None,
        "1",
        "2",
        None,
        None,
    ]


@pytest.mark.parametrize(("by", "why"), [("ada", " "), ("", "mended")])
async def test_nothing_is_done_without_saying_who_and_why(sqlite_url: str, by: str, why: str) -> None:
    service = Service()
    async with open_stage(sqlite_url) as stage:
        [letter] = await dead(stage, undo("1"))
        letters = letters_of(stage, service.handler)
        with pytest.raises(ConfigurationError, match=r"say who does this, and why \(--why\)"):
            await replayed(letters, by=by, why=why)
        with pytest.raises(ConfigurationError, match="say who does this"):
            await letters.discard(ALL, by=by, why=why)
        with pytest.raises(ConfigurationError, match="say who does this"):
            await letters.edit(letter.id, data=b'{"order":"1"}', by=by, why=why)
        assert (await letters.get(letter.id)).status == "dead"


async def test_what_no_database_keeps_is_written_as_an_escape(stage: Stage) -> None:
    """A command line may hold any bytes."""
    [letter] = await dead(stage, undo("1"))
    letters = letters_of(stage)
    assert await letters.find(Query(consumer="a\0\udcff")) == []
    await letters.discard(Query(ids=[letter.id]), by="ada\udcff", why="a\0b")
    [change] = await letters.changes(letter.id)
    assert (change.changed_by, change.reason) == ("ada\\udcff", "a\\0b")


# Edits


def binary(envelope: Envelope) -> dict[str, Any]:
    """Return how somebody else sends a message in binary mode, with an extension of theirs."""
    document = from_json(envelope.encode())
    headers = {f"cloudEvents:{name}": value for name, value in document.items() if name not in ("data", "time")}
    headers |= {"cloudEvents:theirs": "kept", "cloudEvents:time": envelope.time, "x-request": "7"}
    return {"headers": headers, "content_type": "application/json"}


async def test_an_edited_letter_that_came_in_binary_mode_is_a_whole_structured_event(stage: Stage) -> None:
    service = Service()
    sent = undo("typo")
    [letter] = await dead(stage, sent.data, delivered=binary(sent))
    letters = letters_of(stage, service.handler)
    edited = await letters.edit(letter.id, data=b' {"order": "right"}\n', by="ada", why="a typing error")
    assert (edited.body, edited.content_type, edited.headers) == (sent.data, "application/json", letter.headers)
    assert edited.edited_body is not None
    document = from_json(edited.edited_body)
    assert (document["id"], document["specversion"], document["theirs"]) == (sent.id, "1.0", "kept")
    assert document["data"] == {"order": "right"}
    [part] = read_body(edited.edited_body, content_type=STRUCTURED_TYPE, headers={}, encoding=None, limits=Limits())
    assert isinstance(part, Readable)
    assert (part.envelope.saga, part.envelope.time, part.envelope.key) == (sent.saga, sent.time, sent.key)
    service.broken = False
    await stage.start(service.handler)
    await replayed(letters)
    stage.clock.advance(1)
    reply = await stage.replies.next()
    assert (reply.type, service.asked) == ("succeeded", ["right"])


async def test_an_edited_letter_of_a_bundle_keeps_what_we_do_not_know_of_it(stage: Stage) -> None:
    sent = undo("typo")
    body = sent.encode().replace(b'"specversion"', b'"theirs":{"a":[1.0,2e3]},"specversion"')
    bundle = bundle_body([body, undo("other").encode()])
    [letter] = await dead(stage, bundle)
    assert letter.body == body
    data = b'{"order":"right","amount":12345678901234567890.10}'
    edited = await letters_of(stage, Service().handler).edit(letter.id, data=data, by="ada", why="a typing error")
    assert edited.edited_body is not None
    assert b'"theirs":{"a":[1.0,2000.0]}' in edited.edited_body
    assert edited.edited_body.endswith(b'"data":' + data + b"}"), "numbers stay as they were written"
    assert edited.body == body


async def test_an_edited_letter_is_edited_further_from_where_it_is(stage: Stage) -> None:
    sent = undo("1")
    [letter] = await dead(stage, sent.data, delivered=binary(sent))
    letters = letters_of(stage, Service().handler)
    for order in ("2", "3"):
        edited = await letters.edit(letter.id, data=b'{"order":"%b"}' % order.encode(), by="ada", why="a test")
        assert (from_json(edited.to_send)["data"], edited.body) == ({"order": order}, sent.data)


# Order


async def test_a_letter_that_waits_behind_another_is_called_back_and_the_next_goes_on(stage: Stage) -> None:
    service, saga = Service(), uuid4()
    await stage.start(service.handler)
    for order in "123":
        await stage.send(undo(order, saga))
        await stage.dead_letters(int(order))
    letters = letters_of(stage)
    first, second, third = await oldest_first(letters)
    service.broken, service.broken_for = False, {"1"}
    await replayed(letters)
    stage.clock.advance(1)

    async def first_is_dead_again() -> bool:
        return (await letters.get(first.id)).status == "dead"

    await until(first_is_dead_again)
    service.asked.clear()
    assert await letters.replay_of(second) is not None
    assert await letters.discard(Query(ids=[second.id]), by="ada", why="not needed") == 1
    assert await rows(stage) == {third.id}
    assert await letters.replay_of(second) is None
    assert await letters.discard(Query(ids=[first.id]), by="ada", why="by hand") == 1

    async def all_done() -> bool:
        stage.clock.advance(0.5)
        return not await stage.waiting()

    await until(all_done)
    assert service.asked == ["3"]
    assert [(await letters.get(each.id)).status for each in (first, second, third)] == [DISCARDED, DISCARDED, REPLAYED]
    assert second.message_id is not None
    await stage.send(undo_again(second))
    await stage.settled(service.handler)
    assert service.asked == ["3"], "what was called back is not run by a duplicate"


def undo_again(letter: Letter) -> Envelope:
    part = letter.read(Limits())[0]
    assert isinstance(part, Readable)
    return part.envelope


async def test_what_is_being_tried_or_was_handled_is_not_called_back(stage: Stage) -> None:
    service = Service()
    first, second = await dead(stage, undo("1"), undo("2"))
    letters = letters_of(stage, service.handler)
    await replayed(letters)
    claimed = await stage.retries.claim("refund_card", 9, due_or_not=True)
    [held] = [row for row in claimed if row.dead_letter_id == first.id]
    assert await letters.discard(Query(ids=[first.id]), by="ada", why="too late") == 0
    async with transaction(stage.engine) as connection:
        await stage.retries.remove(connection, [held])
    assert await letters.discard(Query(ids=[first.id]), by="ada", why="too late") == 0
    assert (await letters.get(first.id)).status == REPLAYED
    assert [change.act for change in await letters.changes(first.id)] == [REPLAYED]
    assert await letters.discard(Query(), by="ada", why="nothing is dead") == 0
    assert (await letters.get(second.id)).status == REPLAYED


async def test_what_no_queue_took_is_not_sent_before_older_letters_of_its_saga_are_handled(stage: Stage) -> None:
    """Once sent it would wait for nobody."""
    service, saga = Service(), uuid4()
    [older] = await dead(stage, undo("1", saga))
    letter = unroutable_letter(
        undo("2", saga).encode(), Address(Exchange.COMMANDS, "refund.card"), UnroutableError(), attempts=3
    )
    async with transaction(stage.engine) as connection:
        await bury(connection, [letter], ids=stage.ids, now=stage.retries.clock.now())
    letters = letters_of(stage, service.handler)
    for done in (await planned(letters), await replayed(letters)):
        assert [each.refused is None for each in done] == [True, False]
        assert f"letter {older.id} of its saga is to be handled, or discarded, before it" in (done[1].refused or "")
    assert await letters.discard(Query(ids=[older.id]), by="ada", why="by hand") == 1
    assert [each.refused for each in await replayed(letters)] == [None]
    assert await count_rows(stage.engine, outbox) == 1


# Never twice, and nothing that is only said to be done


async def test_a_replay_that_dies_leaves_done_what_it_has_said_and_nothing_of_the_rest(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handlers.replay._PAGE", 2)
    letters = letters_of(stage, Service().handler)
    ids = [letter.id for letter in await dead(stage, *(undo(str(number)) for number in range(5)))]
    replaying = letters.replay(ALL, by="ada", why="mended")
    said = [(await anext(replaying)).letter.id]
    await replaying.aclose()  # the second page was not begun
    assert said == ids[:1]
    assert await rows(stage) == set(ids[:2]) == {letter.id for letter in await letters.find(Query(status=REPLAYED))}
    assert {letter.id for letter in await letters.find(ALL)} == set(ids[2:])

    async def fail(*_: Any, **__: Any) -> None:
        raise OSError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr("handlers.letter_changes.Act.record", fail)
        with pytest.raises(OSError, match="the machine is gone"):
            await replayed(letters)
    assert await rows(stage) == set(ids[:2])
    assert len(await letters.find(ALL)) == 3
    assert [each.letter.id for each in await replayed(letters)] == ids[2:]
    assert await rows(stage) == set(ids)
    assert await count_rows(stage.engine, dead_letter_change) == 5


async def test_letters_that_die_while_others_are_replayed_are_not_meant(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a handler that is still out of order a replay would go on for ever."""
    monkeypatch.setattr("handlers.replay._PAGE", 1)
    letters = letters_of(stage, Service().handler)
    ids = [letter.id for letter in await dead(stage, undo("1"), undo("2"))]
    seen = []
    async for each in letters.replay(ALL, by="ada", why="mended"):
        seen.append(each.letter.id)
        await dead(stage, undo("new"))
    assert seen == ids


async def test_two_operators_replay_one_letter_once_and_the_second_is_told(stage: Stage) -> None:
    letters = letters_of(stage, Service().handler)
    [letter] = await dead(stage, undo("1"))
    query = Query(ids=[letter.id])
    both = await asyncio.gather(replayed(letters, query), replayed(letters, query, by="bob"))
    refused = [each.refused for done in both for each in done if each.refused]
    assert len(refused) == 1
    assert refused[0].startswith("it is replayed, by ")
    assert len(await letters.changes(letter.id)) == 1
    assert len(await stage.waiting()) == 1
    [again] = await planned(letters, query)
    assert (again.refused or "").endswith("only what is dead can be replayed")


async def test_a_letter_whose_message_was_handled_meanwhile_is_not_replayed(stage: Stage) -> None:
    """The record of that was deleted, and the effect made a second time."""
    letters = letters_of(stage, Service().handler)
    failed, handled = undo("1"), undo("2")
    first, second = await dead(stage, failed, handled)
    async with transaction(stage.engine) as connection:
        for envelope, at in ((failed, first.dead_at), (handled, second.dead_at + timedelta(seconds=1))):
            values = {"message_key": envelope.key, "consumer": OF_SAGAS, "handled_at": at}
            await connection.execute(inbox.insert().values(values))
    for done in (await planned(letters), await replayed(letters)):
        assert [each.refused for each in done] == [None, "its message was handled after it had died"]
    assert [row.message_key for row in await stage.handled()] == [handled.key]


async def test_of_letters_of_one_message_one_is_replayed_at_a_time(stage: Stage) -> None:
    letters = letters_of(stage, Service().handler)
    sent = undo("1")
    first, second = await dead(stage, sent, sent)
    for done in (await planned(letters), await replayed(letters)):
        assert [each.refused for each in done] == [None, "its message waits to be tried already"]
    assert (await letters.get(second.id)).status == "dead", "it is not said to be replayed: it was not sent"
    assert [each.refused for each in await replayed(letters)] == ["its message waits to be tried already"]
    assert await rows(stage) == {first.id}


@pytest.mark.postgres
async def test_a_message_that_comes_again_during_its_replay_waits_once(
    pg_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was looked for, and not there yet: the letter would be said to be replayed, with what was edited lost."""
    async with open_stage(pg_url) as stage:
        await stage.retries.clock.calibrate()
        sent = undo("1")
        [letter] = await dead(stage, sent)
        letters = letters_of(stage, Service().handler)
        found: list[Any] = []

        async def nothing(*_: Any) -> list[Any]:
            return found

        monkeypatch.setattr("handlers.replay_plan._waiting.find", nothing)
        [item] = Intake(Limits()).read(FakeDelivery(sent.encode()))
        assert isinstance(item.part, Readable)
        row = Waiting.of(item, item.part, id=stage.ids.new(), consumer="refund_card", now=stage.retries.clock.now())
        async with transaction(stage.engine) as connection:
            await stage.retries.add(connection, [row])
        [done] = await replayed(letters)
        assert done.refused == "its message waits to be tried already"
        assert (await letters.get(letter.id)).status == "dead"
        assert await letters.changes(letter.id) == []


# Handlers that nobody runs


async def test_a_letter_of_a_handler_that_nobody_runs_is_not_replayed_into_the_void(stage: Stage) -> None:
    service = Service()
    group = await stage.start(service.handler)
    gone, here = await dead(stage, undo("1"), consumer="gone"), await dead(stage, undo("2"))
    done = await replayed(letters_of(stage))
    assert [each.letter.id for each in done] == [gone[0].id, here[0].id]
    assert (done[0].refused or "").startswith("no process runs its handler gone: start one, or name the application")
    assert done[1].refused is None
    await group.stop(0)
    await dead(stage, undo("3"))
    assert [each.refused is None for each in await planned(letters_of(stage))] == [False, False]
    named = await planned(letters_of(stage, service.handler))
    assert [each.refused for each in named] == [
        "the application has no handler gone: name the one that has it, or discard the letter",
        None,
    ]


async def test_handlers_of_a_process_that_has_just_died_are_known_for_a_minute(stage: Stage) -> None:
    service = Service()
    await stage.start(service.handler)
    await dead(stage, undo("1"))
    for age, known in ((30, True), (90, False)):
        async with transaction(stage.engine) as connection:
            seen_at = stage.retries.clock.now() - timedelta(seconds=age)
            await connection.execute(update(handler_process).values(seen_at=seen_at))
        assert [each.refused is None for each in await planned(letters_of(stage))] == [known]


# Retention


async def test_letters_that_were_settled_long_ago_are_deleted_with_their_record_in_batches(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handlers.replay._PAGE", 2)
    letters = letters_of(stage, Service().handler)
    ids = [letter.id for letter in await dead(stage, *(undo(str(number)) for number in range(8)))]
    await letters.discard(Query(ids=ids[:5]), by="ada", why="a test")
    await replayed(letters, Query(ids=ids[5:7]))
    async with transaction(stage.engine) as connection:
        old = stage.retries.clock.now() - timedelta(days=31)
        await connection.execute(update(dead_letter).where(dead_letter.c.id.in_(ids[1:])).values(settled_at=old))
        await connection.execute(retry.delete().where(retry.c.dead_letter_id == ids[5]))
    month = timedelta(days=30)
    assert await letters.purge(month, dry_run=True) == 5
    assert len(await letters.find(Query(status=None))) == 8
    assert await letters.purge(month) == 5
    left = {letter.id: letter.status for letter in await letters.find(Query(status=None))}
    assert left == {ids[0]: DISCARDED, ids[6]: REPLAYED, ids[7]: "dead"}, "what waits to be tried may die again"
    assert await count_rows(stage.engine, dead_letter_change) == 2
    assert await letters.purge(month) == 0


async def test_a_query_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no letter died both at"):
        Query(since=START, until=START)
