"""What the store promises, on both databases; what only several processes can show, on PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic_core import to_json
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from coordinator import schema
from coordinator.chain import HistoryRow, history_row
from coordinator.decision import HistoryEntry
from coordinator.instance import Instance, Status, StepState, StepStatus
from coordinator.search import Query
from coordinator.store import Store
from events.database import open_database, transaction
from events.envelope import Direction, Result
from events.errors import StaleRowError
from events.ids import TimeOrderedIds
from tests.support.flows import PATIENCE, START, ManualClock, until

KNOWN = [("trip", 1), ("trip", 2), ("order", 1)]
TRICKY = "Zoë 😀 中文 \u2028 \x01 \x7f ' \" \\ \\u0000 $1 %s :name ?"
LATER = timedelta(seconds=1)

_ids = TimeOrderedIds()


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    engine = open_database(database_url)
    await schema.upgrade(engine)
    yield Store(engine, ManualClock())
    await engine.dispose()


@pytest.fixture
async def shared(pg_url: str) -> AsyncIterator[Store]:
    """A store that several transactions work on at once."""
    engine = open_database(pg_url)
    await schema.upgrade(engine)
    yield Store(engine, ManualClock())
    await engine.dispose()


def made(key: str = "t-1", **fields: Any) -> Instance:
    plain = Instance(
        id=_ids.new(),
        saga="trip",
        version=1,
        key=key,
        status=Status.RUNNING,
        state={"trip": key},
        revision=1,
        created_at=START,
        updated_at=START,
    )
    return replace(plain, **fields)


def moved(instance: Instance, **fields: Any) -> Instance:
    return replace(instance, revision=instance.revision + 1, updated_at=START + LATER, **fields)


def row(instance: Instance, revision: int, entry: HistoryEntry) -> HistoryRow:
    return history_row(instance.id, revision, entry, given=None, head=b"")


def by_id(*instances: Instance) -> dict[Any, Instance]:
    return {instance.id: instance for instance in instances}


async def insert(store: Store, *instances: Instance) -> set[Any]:
    async with transaction(store.engine) as connection:
        return set(await store.insert_new(connection, instances))


async def update(store: Store, instance: Instance, before: Instance) -> None:
    async with transaction(store.engine) as connection:
        await store.update(connection, [instance], by_id(before))


async def load(store: Store, *instances: Instance) -> dict[Any, Instance]:
    async with transaction(store.engine) as connection:
        return await store.load(connection, [instance.id for instance in instances])


async def claim(store: Store, known: list[tuple[str, int]] = KNOWN, most: int = 100) -> list[str]:
    """Claim what is due and let it go again; return the keys."""
    async with transaction(store.engine) as connection:
        due = await store.claim_due(connection, known, most, now=store.clock.now())
        return [instance.key for instance in due.values()]


async def somebody_waits(store: Store, *, waiters: int = 1) -> None:
    """Return when so many transactions wait for another one's lock."""

    async def waiting() -> bool:
        async with transaction(store.engine) as connection:
            query = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            return bool((await connection.execute(text(query))).scalar_one() == waiters)

    await until(waiting)


# What is written comes back


async def test_every_field_comes_back_as_it_was(store: Store) -> None:
    due = datetime(2026, 3, 29, 2, 30, 0, 123457, tzinfo=UTC)
    steps = {
        f"{status}_{answer}": StepState(
            status,
            attempt=3,
            undo_attempt=2,
            sends=7,
            due_at=due + LATER * number,
            answer=answer,
            made_of={"before": [TRICKY, None, {"deep": {}}]},
        )
        for number, status in enumerate(StepStatus)
        for answer in (None, *Result)
    }
    steps["plain"] = StepState(StepStatus.RUNNING)
    steps["of_nothing"] = StepState(StepStatus.UNDOING, made_of={}, before_turn={})
    steps["turned"] = StepState(StepStatus.UNDOING, made_of={"now": 1}, before_turn={"before": [TRICKY]}, alone=True)
    full = made(
        key=TRICKY,
        version=2,
        status=Status.COMPENSATING,
        state={"text": TRICKY, TRICKY: [1, 2.5, -0.001, 2**53 + 1, True, None, "", [], {}], "null": None},
        steps=steps,
        revision=41,
        due_at=due,
        reason=f"because {TRICKY}",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        created_at=START,
        updated_at=due - timedelta(microseconds=1),
    )
    bare = made("bare", status=Status.COMPLETED, state={})
    assert await insert(store, full, bare) == {full.id, bare.id}

    assert await load(store, full, bare) == by_id(full, bare)
    assert await store.find(TRICKY) == [full]
    assert by_id(*await store.list()) == by_id(full, bare)

    changed = moved(
        full,
        status=Status.NEEDS_ATTENTION,
        state={"other": TRICKY},
        steps={"plain": replace(steps["plain"], status=StepStatus.UNDO_FAILED, answer=Result.FAILED)},
        due_at=None,
        reason=None,
    )
    await update(store, changed, full)
    assert await load(store, full, bare) == by_id(changed, bare)


async def test_a_large_state_comes_back_as_it_was(store: Store) -> None:
    large = made(state={f"field {number}": [f"{number} é" * 100] * 10 for number in range(2000)})
    await insert(store, large)
    assert await load(store, large) == by_id(large)
    larger = moved(large, state={**large.state, "more": "😀" * 1_000_000})
    await update(store, larger, large)
    assert await load(store, large) == by_id(larger)


@pytest.mark.parametrize("number", [1e-9, 5e-324, 0.1, -12345678.9, 9007199254740994.0])
async def test_a_float_comes_back_as_it_was(store: Store, number: float) -> None:
    measured = made(state={"amount": number})
    await insert(store, measured)
    assert await load(store, measured) == by_id(measured)


async def test_a_deadline_in_another_zone_is_the_same_moment(store: Store) -> None:
    local = START.astimezone(datetime.fromisoformat("2026-01-01T00:00:00+05:30").tzinfo)
    await insert(store, made(due_at=local))
    [found] = await store.find("t-1")
    assert found.due_at == START
    assert await claim(store) == ["t-1"]


# New instances


async def test_only_new_keys_are_inserted(store: Store) -> None:
    """Also where the key is taken by a finished instance, or twice in the same batch; other sagas have their own."""
    first = made("taken", status=Status.COMPLETED)
    assert await insert(store, first) == {first.id}
    other_saga, fresh, twin = made("taken", saga="order"), made("fresh"), made("fresh")
    inserted = await insert(store, made("taken"), made("taken", version=2), fresh, other_saga, twin)
    assert inserted == {other_saga.id, fresh.id}
    assert await load(store, first, fresh, twin) == by_id(first, fresh)
    assert len(await store.list()) == 3
    assert await insert(store) == set()


async def test_an_insert_that_is_rolled_back_leaves_the_key_free(store: Store) -> None:
    async with store.engine.connect() as connection:
        await store.insert_new(connection, [made()])
        await connection.rollback()
    assert await store.find("t-1") == []
    second = made()
    assert await insert(store, second) == {second.id}


@pytest.mark.parametrize("first_commits", [True, False], ids=["the first commits", "the first rolls back"])
async def test_of_two_transactions_that_insert_one_key_the_second_waits_for_the_first(
    shared: Store, first_commits: bool
) -> None:
    first, second, beside = made("raced"), made("raced"), made("beside")
    async with shared.engine.connect() as connection:
        assert await shared.insert_new(connection, [first]) == {first.id}
        racing = asyncio.create_task(insert(shared, beside, second))
        await somebody_waits(shared)
        assert not racing.done()
        await (connection.commit() if first_commits else connection.rollback())
    assert await racing == ({beside.id} if first_commits else {beside.id, second.id})
    assert await shared.find("raced") == [first if first_commits else second]


async def test_batches_that_insert_the_same_keys_in_any_order_do_not_deadlock(shared: Store) -> None:
    """Each would hold its first key and wait for the other's; both are held up in the middle until both are there."""
    one, two = ([made(key) for key in order] for order in ("amz", "zma"))
    async with shared.engine.connect() as connection:
        await shared.insert_new(connection, [made("m")])
        racing = [asyncio.create_task(insert(shared, *one))]
        await somebody_waits(shared)
        racing.append(asyncio.create_task(insert(shared, *two)))
        await somebody_waits(shared, waiters=2)
        await connection.rollback()
    assert await asyncio.gather(*racing) == [{instance.id for instance in one}, set()]


# Loading and changing


async def test_ids_that_are_not_there_are_left_out(store: Store) -> None:
    present, absent = made(), made()
    await insert(store, present)
    assert await load(store, present, absent) == by_id(present)
    assert await load(store, absent) == {}
    assert await load(store) == {}


async def test_what_one_transaction_has_loaded_another_one_waits_for(shared: Store) -> None:
    contended, free = made("contended"), made("free")
    await insert(shared, contended, free)
    async with shared.engine.connect() as connection:
        await shared.load(connection, [contended.id])
        assert await load(shared, free) == by_id(free)
        loading = asyncio.create_task(load(shared, contended, free))
        await somebody_waits(shared)
        changed = moved(contended, state={"changed": True})
        await shared.update(connection, [changed], by_id(contended))
        assert not loading.done()
        await connection.commit()
    assert await loading == by_id(changed, free)


async def test_an_instance_that_has_moved_on_is_not_written_over_nor_anything_else(store: Store) -> None:
    stale, other = made("stale"), made("other")
    await insert(store, stale, other)
    newer = moved(stale, reason="by somebody else")
    await update(store, newer, stale)

    async def write_all() -> None:
        async with transaction(store.engine) as connection:
            await store.insert_new(connection, [made("new")])
            await store.record(connection, [row(other, 2, HistoryEntry("reply", START, Status.RUNNING))])
            await store.update(connection, [moved(other), moved(stale, reason="late")], by_id(stale, other))

    with pytest.raises(StaleRowError):
        await write_all()
    assert await load(store, stale, other) == by_id(newer, other)
    assert await store.find("new") == []
    assert await store.history(other.id) == []


async def test_an_instance_that_is_gone_counts_as_moved_on(store: Store) -> None:
    gone = made()
    with pytest.raises(StaleRowError):
        await update(store, moved(gone), gone)


async def test_changing_nothing_is_fine(store: Store) -> None:
    async with transaction(store.engine) as connection:
        await store.update(connection, [], {})
        await store.record(connection, [])


# History


async def test_the_history_comes_back_whole_oldest_first(store: Store) -> None:
    subject, other = made("subject"), made("other")
    await insert(store, subject, other)
    told = HistoryEntry(
        kind="reply",
        at=START + timedelta(microseconds=1),
        status=Status.COMPENSATING,
        step="flight",
        direction=Direction.UNDO,
        attempt=2,
        result=Result.DECLINED,
        message_id=TRICKY,
        reason=TRICKY,
        change={"state": {TRICKY: [1, None]}, "steps": {}},
        sent=({"id": "c-1", "type": "cancel.hotel"}, {"id": "c-2", "type": "trip.off"}),
        actor="ada",
        why=TRICKY,
    )
    bare = HistoryEntry("deadline", START, Status.RUNNING)
    async with transaction(store.engine) as connection:
        await store.record(connection, [row(subject, 3, bare), row(other, 1, bare), row(subject, 1, bare)])
    given = to_json({TRICKY: [1, None]}).decode()
    written = history_row(subject.id, 2, told, given=given, head=b"before")
    async with transaction(store.engine) as connection:
        await store.record(connection, [written])

    first, second, third = await store.history(subject.id)
    assert [first.revision, second.revision, third.revision] == [1, 2, 3]
    assert second == (
        *(subject.id, 2, "reply", told.at, "compensating", "flight", "undo", 2, "declined", TRICKY, TRICKY),
        *(told.change, list(told.sent), "ada", TRICKY, {TRICKY: [1, None]}, written[-1]),
    )
    assert third == (
        *(subject.id, 3, "deadline", START, "running", *[None] * 6, {}, [], None, None, None),
        row(subject, 3, bare)[-1],
    )
    assert len(await store.history(other.id)) == 1
    assert await store.history(_ids.new()) == []


async def test_no_revision_is_recorded_twice(store: Store) -> None:
    subject, entry = made(), HistoryEntry("reply", START, Status.RUNNING)
    await insert(store, subject)
    with pytest.raises(IntegrityError):
        async with transaction(store.engine) as connection:
            await store.record(connection, [row(subject, 1, entry), row(subject, 1, entry)])
    assert await store.history(subject.id) == []


# Deadlines


async def test_only_what_is_due_and_known_is_claimed_the_longest_due_first(store: Store) -> None:
    due = store.clock.now()
    await insert(
        store,
        made("just now", due_at=due),
        made("too early", due_at=due + timedelta(microseconds=1)),
        made("long ago", due_at=due - timedelta(days=1000), version=2),
        made("never", due_at=None),
        made("other saga", due_at=due - LATER, saga="order"),
        made("newer version", due_at=due - LATER, version=3),
        made("other saga's version", due_at=due - LATER, saga="order", version=2),
        made("unknown saga", due_at=due - LATER, saga="journey"),
    )
    assert await claim(store) == ["long ago", "other saga", "just now"]
    assert await claim(store, most=2) == ["long ago", "other saga"]
    assert await claim(store, [("order", 1)]) == ["other saga"]
    assert await claim(store, []) == []


async def test_a_claimed_instance_is_whole(store: Store) -> None:
    at = StepState(StepStatus.RUNNING, due_at=START, sends=2, made_of={"trip": TRICKY})
    due = made(due_at=START, steps={"hotel": at}, reason=TRICKY)
    await insert(store, due)
    async with transaction(store.engine) as connection:
        assert await store.claim_due(connection, KNOWN, 10, now=START) == by_id(due)


class WrongClock(ManualClock):
    """A machine whose time of day is ten years ahead."""

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(days=3650)


async def test_deadlines_count_on_the_clock_of_the_database(shared: Store) -> None:
    clock = WrongClock()
    store = Store(shared.engine, clock)
    await store.clock.calibrate()
    async with transaction(store.engine) as connection:
        now: datetime = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
    await insert(store, made("passed", due_at=now - timedelta(hours=1)), made("ahead", due_at=now + LATER * 3600))
    assert await claim(store) == ["passed"]
    clock.advance(3601)
    assert await claim(store) == ["passed", "ahead"]


async def test_two_who_claim_at_once_get_different_instances_and_neither_waits(shared: Store) -> None:
    instances = [made(f"k-{number}", due_at=START - LATER * number) for number in range(10)]
    await insert(shared, *instances)
    async with asyncio.timeout(PATIENCE), shared.engine.connect() as one, shared.engine.connect() as two:
        await shared.load(two, [instances[0].id])  # somebody decides on a reply
        first = await shared.claim_due(one, KNOWN, 6, now=START)
        second = await shared.claim_due(two, KNOWN, 100, now=START)
    assert len(first) == 6
    assert set(first).isdisjoint(second)
    assert {*first, *second} == {instance.id for instance in instances}
    assert instances[0].id in second


# Reading


async def test_an_instance_is_found_by_its_id_and_by_its_key(store: Store) -> None:
    subject = made("t-1")
    namesake = made("t-1", saga="order")
    confusing = made(str(subject.id))
    await insert(store, subject, namesake, confusing)
    assert await store.find(str(namesake.id)) == [namesake]
    assert by_id(*await store.find("t-1")) == by_id(subject, namesake)
    assert by_id(*await store.find(str(subject.id).upper())) == by_id(subject)
    assert by_id(*await store.find(str(subject.id))) == by_id(subject, confusing)
    for nothing in ("t-2", "T-1", "t%", "", str(_ids.new()), "' OR 1=1 --"):
        assert await store.find(nothing) == []


@pytest.fixture
async def mixed(store: Store) -> list[Instance]:
    """Instances of two sagas in all statuses, oldest first."""
    instances = [
        made(f"k-{number}-{status}", saga=saga, status=status)
        for saga, count in (("trip", 2), ("order", 1))
        for number in range(count)
        for status in Status
    ]
    instances.sort(key=lambda instance: instance.id)
    await insert(store, *instances)
    return instances


async def test_a_list_holds_the_newest_of_what_was_asked_for(store: Store, mixed: list[Instance]) -> None:
    newest = mixed[::-1]
    assert list(await store.list()) == newest
    assert list(await store.list(limit=4)) == newest[:4]
    assert list(await store.list(limit=4, after=newest[3].id)) == newest[4:8]
    assert list(await store.list(after=newest[-1].id)) == []
    running = Query("trip", (Status.RUNNING,))
    assert list(await store.list(running, limit=1)) == [
        next(each for each in newest if each.saga == "trip" and each.status is Status.RUNNING)
    ]


async def test_instances_are_counted(store: Store, mixed: list[Instance]) -> None:
    assert len(mixed) == 3 * len(Status)
    assert await store.count_by_status() == {
        (saga, status): count for saga, count in (("trip", 2), ("order", 1)) for status in Status
    }
    assert await store.count_in_flight() == 6


async def test_an_empty_store_has_nothing(store: Store) -> None:
    assert await store.count_by_status() == {}
    assert await store.count_in_flight() == 0
    assert list(await store.list()) == []
    assert await claim(store) == []
