"""What was given up on: grouped, replayed, edited, discarded."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any, Self
from uuid import uuid4

import pytest
from pydantic_core import from_json
from sqlalchemy import text

from coordinator.definition import Saga
from coordinator.flow import sequence
from coordinator.instance import Status
from coordinator.steps import starts_on, step
from events.bus import DEAD_LETTERS, Address, Exchange, Queue
from events.codec import Limits, bundle_body
from events.database import transaction
from events.dead_letters import DeadLetter, bury
from events.envelope import Direction, SagaLink
from events.errors import ConfigurationError, UnroutableError
from events.ids import TimeOrderedIds
from events.intake import Intake
from events.outbox import Outbound
from events.relay import RelayOptions
from handlers import handles
from handlers.broker_letters import BrokerLetters
from handlers.letters import DISCARDED, REPLAYED, Query
from handlers.replay import DeadLetters
from handlers.retries import _COUNT_DUE
from handlers.tables import retry
from tests.support.engines import World, wanted
from tests.support.flows import (
    ChargeCard,
    Charged,
    FakeBus,
    FakeDelivery,
    OrderPlaced,
    RefundCard,
    Stage,
    count_rows,
    enveloped,
    make_relay,
    open_stage,
    open_store,
    until,
)
from tests.support.letters import (
    ALL,
    ONCE,
    Service,
    letters_of,
    oldest_first,
    planned,
    replayed,
    undo,
)
from tests.support.sagas import BookHotel, TripWanted


@handles(OrderPlaced, name="other")
async def other_handler(event: OrderPlaced) -> None:
    raise ValueError(event.order)


@pytest.fixture(params=["embedded", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    url = request.getfixturevalue("pg_url" if request.param == "postgres" else "sqlite_url")
    async with open_stage(url, embedded=request.param == "embedded") as opened:
        yield opened


async def test_a_replay_reaches_the_one_handler_that_failed_under_the_same_id(stage: Stage) -> None:
    service, seen = Service(), []

    @handles(RefundCard, name="bystander")
    async def bystander(command: RefundCard) -> None:
        seen.append(command.order)

    await stage.start(service.handler)
    sent = undo("1")
    await stage.send(sent)
    [dead] = await stage.dead_letters(1)
    assert (await stage.replies.next()).type == "failed"
    await stage.start(bystander)
    service.broken = False
    letters = letters_of(stage)
    [done] = await replayed(letters, Query(ids=[dead.id]), why="mended")
    assert (done.letter.id, done.refused, done.behind) == (dead.id, None, None)
    stage.clock.advance(1)
    reply = await stage.replies.next()
    assert (reply.type, reply.causation_id) == ("succeeded", sent.id)
    assert service.asked == ["1", "1"]
    assert seen == []
    letter = await letters.get(dead.id)
    assert (letter.status, letter.settled_by, letter.settled_why) == (REPLAYED, "ada", "mended")
    assert letter.body == sent.encode()
    assert await stage.waiting() == []
    await stage.send(sent)
    assert (await stage.replies.next()).type == "succeeded", "a duplicate gets the answer of the replay"
    assert service.asked == ["1", "1"]


async def test_a_replay_in_vain_opens_the_same_letter_again(stage: Stage) -> None:
    service = Service()
    await stage.start(service.handler)
    await stage.send(undo("1"))
    [dead] = await stage.dead_letters(1)
    letters = letters_of(stage)
    await replayed(letters)
    assert (await letters.get(dead.id)).status == REPLAYED
    stage.clock.advance(1)

    async def dead_again() -> bool:
        return (await letters.get(dead.id)).status == "dead"

    await until(dead_again)
    [letter] = await letters.find(Query(status=None))
    assert (letter.settled_by, letter.settled_at, letter.attempts) == (None, None, 2)
    assert letter.first_at == dead.first_at
    assert await stage.waiting() == []


async def test_a_command_of_a_saga_is_not_replayed_for_the_saga_has_gone_on(stage: Stage) -> None:
    @handles(ChargeCard, retry=ONCE)
    async def charge_card(command: ChargeCard) -> None:
        raise ValueError(command.order)

    await stage.start(charge_card)
    await stage.send(enveloped(ChargeCard(order="1"), saga=SagaLink(uuid4(), "charge", Direction.DO, 1)))
    await stage.dead_letters(1)
    await stage.send(enveloped(ChargeCard(order="2")))
    await stage.dead_letters(2)
    letters = letters_of(stage)
    for done in (await planned(letters), await replayed(letters)):
        assert [each.refused is None for each in done] == [False, True]
        assert "its saga was told that it failed and has gone on" in (done[0].refused or "")
    assert [letter.status for letter in await oldest_first(letters, Query(status=None))] == ["dead", REPLAYED]


async def test_who_waits_behind_another_is_not_due_and_is_found_without_looking_at_all_others(stage: Stage) -> None:
    """Each look once compared all with all, and was made anew at once: thousands of them stopped their handler."""
    service, saga = Service(), uuid4()
    group = await stage.start(service.handler)
    for order in "12":
        await stage.send(undo(order, saga))
        await stage.dead_letters(int(order))
    await group.stop(0)
    letters = letters_of(stage, service.handler)
    await replayed(letters)
    stage.clock.advance(1)
    assert await stage.retries.count_due() == {"refund_card": (1, 0)}
    [first] = await stage.retries.claim("refund_card", 9)
    assert await stage.retries.count_due() == {}
    async with transaction(stage.engine) as connection:
        await stage.retries.remove(connection, [first])
    assert await stage.retries.count_due() == {"refund_card": (1, 0)}
    if stage.engine.dialect.name == "sqlite":  # where a small table is read by its indexes, too
        async with transaction(stage.engine) as connection:
            plan = "EXPLAIN QUERY PLAN " + str(_COUNT_DUE)
            steps = [row.detail for row in (await connection.execute(text(plan), {"now": 0})).all()]
        assert any("older USING COVERING INDEX ix_retry_replayed (saga_id=?" in each for each in steps), steps
        assert any("dead USING INDEX ix_dead_letter_saga (saga_id=?" in each for each in steps), steps


async def test_letters_of_one_saga_are_replayed_in_order_and_wait_behind_one_that_dies_again(stage: Stage) -> None:
    service, saga = Service(), uuid4()
    await stage.start(service.handler)
    for order in "123":
        await stage.send(undo(order, saga))
        await stage.dead_letters(int(order))
    await stage.send(undo("other"))
    await stage.dead_letters(4)
    letters = letters_of(stage)
    first, second, third, _ = await oldest_first(letters)
    service.broken, service.broken_for = False, {"1"}
    service.asked.clear()
    assert [each.behind for each in await planned(letters)] == [None, first.id, second.id, None]
    await replayed(letters)
    stage.clock.advance(1)

    async def first_is_dead_again() -> bool:
        return (await letters.get(first.id)).status == "dead" and "other" in service.asked

    await until(first_is_dead_again)
    assert sorted(service.asked) == ["1", "other"]
    assert {row.dead_letter_id for row in await stage.waiting()} == {second.id, third.id}
    assert await letters.discard(Query(ids=[first.id]), by="ada", why="refunded by hand") == 1
    while service.asked[2:] != ["2", "3"]:
        stage.clock.advance(1)
        await until(lambda: _one_more(service, stage))
    assert await stage.waiting() == [], "the last one was handled"
    assert (await letters.get(first.id)).status == DISCARDED


async def _one_more(service: Service, stage: Stage) -> bool:
    left = await stage.waiting()
    return len(service.asked) - 2 + len(left) == 2


async def test_a_rate_spreads_a_replay(stage: Stage) -> None:
    service = Service()
    await stage.start(service.handler)
    for number in range(4):
        await stage.send(undo(str(number)))
    await stage.dead_letters(4)
    await stage.settled(service.handler)
    letters = letters_of(stage)
    assert [each.after for each in await planned(letters, rate=2)] == [0, 0.5, 1, 1.5]
    service.broken = False
    service.asked.clear()
    await replayed(letters, rate=0.2)  # one in 5 s
    due = sorted(row.due_at for row in await stage.waiting())
    assert [later - due[0] for later in due] == [timedelta(seconds=5 * number) for number in range(4)]
    for number in range(1, 5):
        stage.clock.advance(3 if number == 1 else 5)  # the clocks of two parties are some seconds apart

        async def so_many(number: int = number) -> bool:
            return len(service.asked) == number

        await until(so_many)
    assert sorted(service.asked) == ["0", "1", "2", "3"]


async def test_letters_are_grouped_by_their_cause_and_found_by_what_is_known_of_them(stage: Stage) -> None:
    service = Service()

    @handles(OrderPlaced, retry=ONCE)
    async def look_up(event: OrderPlaced) -> None:
        raise LookupError(event.order) if event.order == "1" else TypeError("other")

    await stage.start(service.handler)
    await stage.start(look_up)
    for number in range(3):
        await stage.send(undo(f"a{number}"))
        await stage.send(enveloped(OrderPlaced(order=str(number))), exchange=Exchange.EVENTS)
    await stage.dead_letters(6)
    letters = letters_of(stage)
    groups = await letters.groups(ALL)
    assert [(group.consumer, group.count, group.example.error_type) for group in groups] == [
        ("refund_card", 3, "ValueError"),
        ("look_up", 2, "TypeError"),
        ("look_up", 1, "LookupError"),
    ]
    assert groups[0].example.summary.startswith("ValueError: no refund for order a")
    assert len(await letters.find(Query(fingerprint=groups[1].fingerprint))) == 2
    assert len(await letters.find(Query(consumer="look_up"))) == 3
    assert len(await letters.find(Query(message_type="refund.card", reason="failed"))) == 3
    assert await letters.find(Query(reason="crashed")) == []
    assert len(await letters.find(ALL, limit=2)) == 2


async def test_a_letter_is_edited_and_the_original_is_kept(stage: Stage) -> None:
    service = Service()
    service.broken, service.broken_for = False, {"typo"}
    await stage.start(service.handler)
    sent = undo("typo")
    await stage.send(sent)
    [dead] = await stage.dead_letters(1)
    letters = letters_of(stage, service.handler)
    edited = await letters.edit(dead.id, data=b'{"order":"right"}', by="ada", why="a typing error")
    assert edited.body == sent.encode()
    sent.data = b'{"order":"right"}'
    assert edited.edited_body == sent.encode()
    await replayed(letters)
    stage.clock.advance(1)
    assert (await stage.replies.next()).type == "failed"
    reply = await stage.replies.next()
    assert (reply.type, reply.causation_id) == ("succeeded", sent.id)
    assert service.asked == ["typo", "right"]
    assert (await letters.get(dead.id)).body == dead.body


async def test_what_cannot_be_edited_or_found_is_an_error_that_says_so(stage: Stage) -> None:
    service = Service()
    await stage.start(service.handler)
    await stage.send(undo("1"))
    [dead] = await stage.dead_letters(1)
    letters = letters_of(stage, service.handler)
    letter = await letters.get(dead.id)
    for data, says in (
        (b"{", "not JSON"),
        (b"[]", "a JSON object"),
        (b'{"order":"\\u0000"}', "nobody could read"),
        (b'{"order":"1","order":"2"}', "nobody could read that: the name 'order' stands twice"),
        (b'{"order":NaN}', "nobody could read that: NaN is not JSON"),
        (b'{"order":7}', "refund_card could not take that: RefundCard: order: Input should be a valid string"),
        (b"{}", "refund_card could not take that: RefundCard: order: Field required"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            await letters.edit(dead.id, data=data, by="ada", why="a test")
    for event, says in (
        (undo("1").encode(), "the event's id must stay as it was"),
        (letter.body.replace(b'"undo"', b'"do"'), "the event's saga must stay as it was"),
        (bundle_body([letter.body, letter.body]), "several events"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            await letters.edit(dead.id, event=event, by="ada", why="a test")
    with pytest.raises(ConfigurationError, match="there is no dead letter"):
        await letters.get(uuid4())
    with pytest.raises(ConfigurationError, match=r"name the application \(--app\)"):
        await letters_of(stage).edit(dead.id, event=letter.body, by="ada", why="a test")
    with pytest.raises(ConfigurationError, match="the application has no handler refund_card"):
        await letters_of(stage, other_handler).edit(dead.id, event=letter.body, by="ada", why="a test")
    assert (await letters.get(dead.id)).edited_body is None
    assert await letters.changes(dead.id) == []
    await letters.discard(ALL, by="bob", why="never mind")
    with pytest.raises(ConfigurationError, match="it is discarded, by bob; only what is dead can be edited"):
        await letters.edit(dead.id, event=letter.body, by="ada", why="a test")
    assert await replayed(letters) == []


async def test_an_unreadable_letter_is_replayed_only_after_it_was_edited(stage: Stage) -> None:
    service = Service()
    service.broken = False
    await stage.start(service.handler)
    await stage.send_raw("refund.card", b"[nonsense]")
    [dead] = await stage.dead_letters(1)
    letters = letters_of(stage, service.handler)
    [refused] = await replayed(letters)
    assert (refused.refused or "").startswith("it cannot be read:")
    assert (refused.refused or "").endswith("edit it first")
    assert await stage.waiting() == []
    with pytest.raises(ConfigurationError, match="no envelope that can be kept; give the whole event"):
        await letters.edit(dead.id, data=b"{}", by="ada", why="their bug")
    sent = undo("1")
    edited = await letters.edit(dead.id, event=bundle_body([sent.encode()]), by="ada", why="their bug")
    assert (edited.edited_body, edited.message_id, edited.message_type) == (sent.encode(), sent.id, "refund.card")
    assert edited.saga_id == (sent.saga and sent.saga.saga_id), "it is in the order of its saga from now on"
    assert [each.refused for each in await replayed(letters)] == [None]
    stage.clock.advance(1)
    assert (await stage.replies.next()).causation_id == sent.id
    assert (await letters.get(dead.id)).body == dead.body


async def test_a_compensation_waits_behind_its_sagas_command_until_that_is_discarded(stage: Stage) -> None:
    """The command that began the trouble is a letter, too, and cannot be replayed: the plan says what to do."""
    service, saga = Service(), uuid4()

    @handles(ChargeCard, retry=ONCE)
    async def charge_card(command: ChargeCard) -> None:
        raise ValueError(command.order)

    await stage.start(service.handler, charge_card)
    await stage.send(enveloped(ChargeCard(order="1"), saga=SagaLink(saga, "charge", Direction.DO, 1)))
    await stage.dead_letters(1)
    await stage.send(undo("1", saga))
    await stage.dead_letters(2)
    service.broken = False
    service.asked.clear()
    letters = letters_of(stage)
    first, _ = await oldest_first(letters)
    for command, compensation in (await planned(letters), await replayed(letters)):
        assert command.refused is not None
        assert (compensation.refused, compensation.behind, compensation.held_by) == (None, first.id, first.id)
    stage.clock.advance(1)
    await letters.discard(Query(ids=[first.id]), by="ada", why="its saga was undone")

    async def handled() -> bool:
        stage.clock.advance(1)
        return not await stage.waiting()

    await until(handled)
    assert service.asked == ["1"]


async def test_a_plan_says_what_waits_behind_a_letter_that_is_being_replayed(stage: Stage) -> None:
    service, saga = Service(), uuid4()
    await stage.start(service.handler)
    for order in "12":
        await stage.send(undo(order, saga))
        await stage.dead_letters(int(order))
    letters = letters_of(stage)
    first, second = await oldest_first(letters)
    await replayed(letters, Query(ids=[first.id]), rate=0.001)
    [after] = await planned(letters)
    assert (after.letter.id, after.behind, after.held_by) == (second.id, first.id, None)


async def test_a_letter_is_found_by_the_begin_of_its_id_and_by_when_it_died(stage: Stage) -> None:
    service = Service()
    await stage.start(service.handler)
    for order in "12":
        await stage.send(undo(order))
        await stage.dead_letters(int(order))
    letters = letters_of(stage)
    first, second = await oldest_first(letters)
    assert (await letters.get(str(first.id)[:-1])).id == first.id
    assert (await letters.get(second.id.hex[:30].upper())).id == second.id
    with pytest.raises(ConfigurationError, match="several dead letters begin with 0; give more"):
        await letters.get("0")
    for strange in ("", "%", "zz", "0" * 33):
        with pytest.raises(ConfigurationError, match="is no id of a dead letter"):
            await letters.get(strange)
    assert len(await letters.find(Query(since=first.dead_at, until=second.dead_at + timedelta(seconds=1)))) == 2
    assert await letters.find(Query(until=first.dead_at)) == []
    assert await letters.find(Query(since=second.dead_at + timedelta(seconds=1))) == []


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
async def test_a_rate_that_is_none_is_refused(sqlite_url: str, rate: float) -> None:
    async with open_stage(sqlite_url) as stage:
        for work in (planned, replayed):
            with pytest.raises(ConfigurationError, match="a rate is more than 0"):
                await work(letters_of(stage), rate=rate)


async def test_the_summary_of_an_error_is_its_first_line(stage: Stage) -> None:
    @handles(OrderPlaced, retry=ONCE)
    async def look_up(event: OrderPlaced) -> None:
        raise ValueError("the first line\nand the second") from LookupError(event.order)

    await stage.start(look_up)
    await stage.send(enveloped(OrderPlaced(order="1")), exchange=Exchange.EVENTS)
    await stage.dead_letters(1)
    [letter] = await letters_of(stage).find(ALL)
    assert letter.summary == "ValueError: the first line"


async def test_a_letter_whose_row_is_gone_becomes_a_new_one(stage: Stage) -> None:
    """Whoever deletes old letters may delete one that is being replayed."""
    [item] = Intake(Limits()).read(FakeDelivery(bundle_body([undo("1").encode()])))
    letter = DeadLetter(item, "refund_card", "failed", "why", attempts=3, reopens=uuid4())
    async with transaction(stage.engine) as connection:
        await bury(connection, [letter], ids=stage.ids, now=stage.clock.now())
    [kept] = await letters_of(stage).find(ALL)
    assert (kept.body, kept.attempts) == (item.part.raw, 3)


# Letters of the broker


def died(queue: str, reason: str = "delivery_limit") -> dict[str, Any]:
    return {"x-first-death-queue": queue, "x-first-death-reason": reason, "x-death": [{"count": 1}]}


async def broker_letters(stage: Stage) -> BrokerLetters:
    taking = BrokerLetters(
        stage.engine, bus=stage.bus, outbox=stage.outbox, clock=stage.clock, ids=stage.ids, limits=Limits()
    )
    await stage.bus.declare([Queue(DEAD_LETTERS, ())])
    await taking.start()
    return taking


async def test_what_the_broker_gives_up_on_is_a_letter_for_each_message_acknowledged_once_it_is_kept(
    sqlite_url: str,
) -> None:
    async with open_stage(sqlite_url) as stage:
        taking = await broker_letters(stage)
        bus = stage.bus
        assert isinstance(bus, FakeBus)
        first, second = undo("1"), undo("2")
        sent = [
            FakeDelivery(bundle_body([first.encode(), second.encode()]), headers=died("saga.handler.refund_card")),
            FakeDelivery(b"[nonsense]", headers=died("saga.coordinator.replies", "expired")),
            FakeDelivery(b"[nonsense]", headers=died("theirs", "made up")),
            FakeDelivery(b"[nonsense]"),
        ]
        bus.put(DEAD_LETTERS, *sent)
        await stage.dead_letters(5)
        kept = await oldest_first(letters_of(stage))
        assert sorted((each.consumer, each.reason, each.body) for each in kept) == sorted(
            [
                ("refund_card", "delivery_limit", first.encode()),
                ("refund_card", "delivery_limit", second.encode()),
                ("coordinator", "expired", b"[nonsense]"),
                ("theirs", "rejected", b"[nonsense]"),
                ("bus", "delivery_limit", b"[nonsense]"),
            ]
        )
        await until(lambda: _acknowledged(sent))
        assert taking.failing == frozenset()
        await taking.stop()


async def _acknowledged(sent: list[FakeDelivery]) -> bool:
    return [each.acks for each in sent] == [1] * len(sent)


async def test_what_was_handled_is_not_handled_again_by_replaying_a_letter_of_the_broker(sqlite_url: str) -> None:
    """A process may die after each commit and before each acknowledgement: then the broker gives up what is done."""
    async with open_stage(sqlite_url) as stage:
        service = Service()
        service.broken = False
        await stage.start(service.handler)
        taking = await broker_letters(stage)
        sent = undo("1")
        await stage.send(sent)
        assert (await stage.replies.next()).type == "succeeded"
        bus = stage.bus
        assert isinstance(bus, FakeBus)
        bus.put(DEAD_LETTERS, FakeDelivery(sent.encode(), headers=died("saga.handler.refund_card")))
        await stage.dead_letters(1)
        await replayed(letters_of(stage))
        stage.clock.advance(1)
        assert (await stage.replies.next()).type == "succeeded"
        assert service.asked == ["1"]
        await taking.stop()


# Letters of the coordinator


class Picky(Saga):
    """A saga whose code is out of order until it is mended."""

    trip: str

    @starts_on(TripWanted)
    @classmethod
    def wanted(cls, event: TripWanted) -> Self:
        if event.trip in broken_trips:
            raise ValueError(event.trip)
        return cls(trip=event.trip)

    @step
    def hotel(self) -> BookHotel:
        return BookHotel(trip=self.trip)

    flow = sequence(hotel)


broken_trips: set[str] = set()


async def test_a_start_that_the_coordinator_could_not_take_is_replayed_and_opened_again_if_in_vain(
    database_url: str,
) -> None:
    broken_trips.add("t-1")
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(open_store(database_url))
        world = World(database_url, engine, stack)
        coordinator = await world.coordinator(Picky)
        await coordinator.take(wanted())
        letters = DeadLetters(engine, clock=world.clock, ids=TimeOrderedIds())
        [dead] = await letters.find(ALL)
        assert (dead.consumer, dead.reason, dead.attempts) == ("coordinator", "failed", 1)

        async def again(status: str) -> bool:
            world.clock.advance(1)
            return (await letters.get(dead.id)).status == status and not await count_rows(engine, retry)

        assert [each.refused for each in await replayed(letters)] == [None]
        await until(lambda: again("dead"))
        assert (await letters.get(dead.id)).attempts == 2
        broken_trips.clear()
        await replayed(letters)
        await until(lambda: again(REPLAYED))
        assert (await world.instance()).status is Status.RUNNING
        assert len(await letters.find(Query(status=None))) == 1


async def test_i16_all_of_many_letters_of_all_kinds_are_handled_once_after_the_repair(stage: Stage) -> None:
    service, shown = Service(), []

    @handles(OrderPlaced, retry=ONCE)
    async def show(event: OrderPlaced) -> Charged | None:
        if service.broken:
            raise LookupError(event.order)
        shown.append(event.order)
        return None

    await stage.start(service.handler)
    await stage.start(show)
    sagas = [uuid4() for _ in range(10)]
    await stage.send(*(undo(str(number), sagas[number % 10]) for number in range(50)))
    await stage.send(*(enveloped(OrderPlaced(order=str(n))) for n in range(50)), exchange=Exchange.EVENTS)
    await stage.dead_letters(100)
    service.broken = False
    service.asked.clear()
    letters = letters_of(stage)
    died = {
        letter.message_id: letter for letter in await oldest_first(letters, Query(consumer="refund_card"), limit=100)
    }
    assert len(await replayed(letters, rate=1000)) == 100

    async def all_done() -> bool:
        stage.clock.advance(0.5)
        return not await stage.waiting()

    await until(all_done)
    assert sorted(service.asked, key=int) == [str(number) for number in range(50)]
    assert sorted(shown, key=int) == [str(number) for number in range(50)]
    for saga in sagas:
        order = [from_json(letter.body)["data"]["order"] for letter in died.values() if letter.saga_id == saga]
        assert [each for each in service.asked if each in order] == order, "the order of each saga is kept"
    assert await letters.find(ALL) == []


async def test_a_message_that_no_queue_takes_becomes_a_letter_and_is_sent_again_by_a_replay(
    sqlite_url: str,
) -> None:
    async with open_stage(sqlite_url) as stage:
        bus = stage.bus
        assert isinstance(bus, FakeBus)
        relay = make_relay(stage.engine, bus, stage.clock, options=RelayOptions(unroutable_for=60))
        bus.answer = lambda _: UnroutableError()
        envelope = enveloped(ChargeCard(order="1"))
        age = stage.ids.new().int >> 80  # ids tell the real time: bring the stage's clock there
        stage.clock.advance(age / 1000 - stage.clock.now().timestamp())
        async with stage.engine.begin() as connection:
            await relay.write(connection, [Outbound(envelope, Address(Exchange.COMMANDS, "charge.card"))])
        stage.clock.advance(30)
        await relay.sweep()
        assert await stage.dead() == []
        stage.clock.advance(60)
        await relay.sweep()
        [dead] = await stage.dead()
        assert (dead.consumer, dead.reason, dead.message_id) == ("bus", "unroutable", envelope.id)
        assert dead.headers == {"exchange": "commands", "routing_key": "charge.card"}
        assert await stage.unsent() == []
        bus.answer = lambda _: None
        await replayed(letters_of(stage))
        await relay.sweep()
        [sent] = bus.published
        assert sent.body == bundle_body([envelope.encode()])
        assert sent.address == Address(Exchange.COMMANDS, "charge.card")


def test_no_field_of_a_query_is_any_letter() -> None:
    assert not ALL.is_narrow
    assert Query(consumer="x").is_narrow
