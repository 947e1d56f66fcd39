"""What `coordinator verify` finds on both databases: whatever was changed, removed or moved; else nothing."""

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Update, delete, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator import schema
from coordinator.chain import history_row
from coordinator.decision import Decision
from coordinator.instance import Status, StepState, StepStatus
from coordinator.invariants import LATE, Finding
from coordinator.store import Store
from coordinator.tables import saga_history, saga_instance
from coordinator.verification import Verification
from events.database import open_database, transaction
from events.derive import derive_id
from events.envelope import Direction, Result
from events.ids import TimeOrderedIds
from handlers.fence import UNTRIED
from handlers.inbox import OF_SAGAS
from handlers.tables import inbox
from tests.support.flows import START, ManualClock
from tests.support.histories import chained
from tests.support.sagas import SAGA_ID, FlightBooked, Run

_ids = TimeOrderedIds()
TRICKY = "Zoë 😀 \u2028 \x01\x08\x0c\n\r\t\x1f\x7f ' \" \\ \\u0000 </"
OVERDUE = "nobody has acted"  # on PostgreSQL, whose clock goes on, every deadline of these sagas has passed
HISTORY, INSTANCE = saga_history.c, saga_instance.c


class World:
    """A database with sagas that were decided on by hand."""

    def __init__(self, store: Store, clock: ManualClock) -> None:
        self.store = store
        self.engine = store.engine
        self.clock = clock

    async def write(self, decisions: list[Decision], key: str = "t-1") -> UUID:
        instance, rows = chained(decisions, _ids.new(), key)
        async with transaction(self.engine) as connection:
            await self.store.insert(connection, [instance])
            await self.store.record(connection, rows)
        return instance.id

    async def tamper(self, *statements: Any) -> None:
        """Write what the coordinator never would; who owns the database can switch foreign keys off."""
        async with self.engine.connect() as connection:
            await _drop_foreign_key(connection)
            for statement in statements:
                await connection.execute(statement)
            await connection.commit()

    async def findings(self, **options: Any) -> set[tuple[UUID, str, str]]:
        found = Verification(self.engine, self.clock, **options)
        found_all = [each async for each in found.findings()]
        return {(each.saga_id, each.invariant, each.detail) for each in found_all if OVERDUE not in each.detail}

    async def broken(self, saga_id: UUID) -> set[str]:
        """The numbers of the invariants that do not hold; all findings are of this saga."""
        found = await self.findings()
        assert {each for each, _, _ in found} <= {saga_id}
        return {invariant for _, invariant, _ in found}


async def _drop_foreign_key(connection: AsyncConnection) -> None:
    if connection.dialect.name == "postgresql":
        await connection.execute(text("ALTER TABLE saga_history DROP CONSTRAINT IF EXISTS fk_saga_history_saga_id"))
    else:
        raw: Any = (await connection.get_raw_connection()).driver_connection
        raw.cursor().plain.execute("PRAGMA foreign_keys=OFF")


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    engine, clock = open_database(database_url), ManualClock()
    await schema.upgrade(engine)
    yield World(Store(engine, clock), clock)
    await engine.dispose()


def completed() -> list[Decision]:
    run = Run()
    for step in ("hotel", "flight", "payment"):
        run.done(step, outcome=FlightBooked(ticket=TRICKY) if step == "flight" else None)
    return run.decisions


def compensated() -> list[Decision]:
    """The flight gives no answer, is undone, and says late that it was done: it is undone once more."""
    run = Run()
    run.done("hotel")
    for _ in range(3):
        run.expire()
    run.replied("flight", Direction.DO, Result.SUCCEEDED, FlightBooked(ticket="late"))
    run.undone("flight", attempt=2)
    run.undone("hotel")
    assert run.status is Status.COMPENSATED
    return run.decisions


def running() -> list[Decision]:
    run = Run()
    run.done("hotel")
    return run.decisions


def of_history(saga_id: UUID, revision: int, **values: Any) -> Update:
    changed = update(saga_history).where(HISTORY.saga_id == saga_id, HISTORY.revision == revision)
    return changed.values(values) if values else changed


def of_instance(saga_id: UUID, **values: Any) -> Update:
    return update(saga_instance).where(INSTANCE.id == saga_id).values(values)


async def test_nothing_is_found_where_all_holds(world: World) -> None:
    """Sagas that are running, ended both ways, or stuck; with everything in their text that has to be escaped."""
    stuck = Run()
    stuck.done("hotel")
    stuck.done("flight", Result.DECLINED)
    stuck.undone("hotel", Result.FAILED)
    assert stuck.status is Status.NEEDS_ATTENTION
    odd = [replace(each, entry=replace(each.entry, why=TRICKY, actor=TRICKY)) for each in completed()]
    for number, decisions in enumerate((completed(), compensated(), running(), stuck.decisions, odd)):
        await world.write(decisions, f"{TRICKY} {number}")
    verification = Verification(world.engine, world.clock)
    assert [each async for each in verification.findings() if OVERDUE not in each.detail] == []
    checked = verification.checked
    assert (checked.sagas, checked.transitions) == (5, 4 + 8 + 2 + 4 + 4)
    assert checked.retold == 3


async def test_an_empty_database_holds(world: World) -> None:
    assert await world.findings() == set()


EDITS: dict[str, Any] = {
    "kind": "deadline",
    "at": START + timedelta(days=1),
    "status": "compensated",
    "step": "hotels",
    "direction": None,
    "attempt": 2,
    "result": "failed",
    "message_id": "",
    "reason": "a",
    "actor": "eve",
    "why": "",
    "input": "null",
    "change": "{}",
    "sent": "[]",
    "hash": b"",
}


@pytest.mark.parametrize("column", EDITS)
async def test_i13_a_row_of_history_that_was_changed_is_found(world: World, column: str) -> None:
    saga_id, _ = await world.write(completed()), await world.write(completed(), "other")
    await world.tamper(of_history(saga_id, 2, **{column: EDITS[column]}))
    assert "I13" in await world.broken(saga_id)


@pytest.mark.parametrize("revision", [1, 2, 4])
async def test_i13_a_row_of_history_that_was_removed_is_found(world: World, revision: int) -> None:
    saga_id = await world.write(completed())
    await world.tamper(delete(saga_history).where(HISTORY.revision == revision))
    assert "I13" in await world.broken(saga_id)


async def test_i13_rows_of_history_that_have_changed_places_are_found(world: World) -> None:
    saga_id = await world.write(completed())
    moves = ((2, 99), (3, 2), (99, 3))
    await world.tamper(*(of_history(saga_id, old).values(revision=new) for old, new in moves))
    assert "I13" in await world.broken(saga_id)


async def test_i13_a_row_that_was_written_anew_with_a_hash_of_its_own_is_found(world: World) -> None:
    """Whoever knows the format can seal one row; the next one, or the instance, still knows the old one."""
    decisions = completed()
    saga_id = await world.write(decisions)
    for revision in (2, 4):
        before = chained(decisions, saga_id, "t-1")[1][revision - 2][-1]
        forged = replace(decisions[revision - 1].entry, message_id="forged")
        row = history_row(saga_id, revision, forged, given=None, head=before)
        await world.tamper(of_history(saga_id, revision, message_id="forged", hash=row[-1]))
        assert await world.broken(saga_id) == {"I13"}
        await world.tamper(delete(saga_history), delete(saga_instance))
        saga_id = await world.write(decisions)


async def test_i13_a_saga_without_history_and_a_history_without_a_saga_are_found(world: World) -> None:
    without, alone = await world.write(completed(), "without"), await world.write(completed(), "alone")
    await world.tamper(
        delete(saga_history).where(HISTORY.saga_id == without), delete(saga_instance).where(INSTANCE.id == alone)
    )
    assert {(saga_id, number) for saga_id, number, _ in await world.findings()} == {(without, "I13"), (alone, "I13")}


@pytest.mark.parametrize(
    ("values", "invariant"),
    [
        ({"status": "running"}, "I9"),
        ({"reason": "because"}, "I9"),
        ({"updated_at": START + timedelta(days=9)}, "I9"),
        ({"revision": 3}, "I13"),
        ({"head": b"x"}, "I13"),
        ({"status": "compensated"}, "I9"),
    ],
)
async def test_an_instance_that_is_not_what_its_last_row_says_is_found(
    world: World, values: dict[str, Any], invariant: str
) -> None:
    saga_id = await world.write(completed())
    await world.tamper(of_instance(saga_id, **values))
    assert invariant in await world.broken(saga_id)


async def test_i9_a_state_and_steps_that_the_history_does_not_tell_are_found(world: World) -> None:
    saga_id = await world.write(running())
    await world.tamper(of_instance(saga_id, state={"trip": "t-9", "faults": [], "ticket": None, "refusal": None}))
    assert {(number, detail) for _, number, detail in await world.findings()} == {
        ("I9", "its state is not what its history tells: trip")
    }
    await world.tamper(of_instance(saga_id, steps={"hotel": running()[-1].instance.steps["hotel"].to_json()}))
    assert ("I9", "its steps are not what its history tells: flight") in {
        (number, detail) for _, number, detail in await world.findings()
    }


async def test_i9_a_saga_that_only_went_well_is_compared_with_its_history_too(world: World) -> None:
    instance = completed()[-1].instance
    state_id, steps_id = await world.write(completed(), "state"), await world.write(completed(), "steps")
    await world.write(completed(), "good")
    steps = {name: replace(at, attempt=7) if name == "hotel" else at for name, at in instance.steps.items()}
    await world.tamper(
        of_instance(state_id, state={**instance.state, "ticket": "another"}),
        of_instance(steps_id, steps={name: at.to_json() for name, at in steps.items()}),
    )
    assert await world.findings() == {
        (state_id, "I9", "its state is not what its history tells: ticket"),
        (steps_id, "I9", "its steps are not what its history tells: hotel"),
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": {"hotel": {"status": "evil"}}}, "'evil' is not a valid StepStatus"),
        ({"state": []}, "'list' object has no attribute"),
    ],
)
async def test_i9_a_saga_that_cannot_be_read_hides_no_other(world: World, values: dict[str, Any], said: str) -> None:
    broken = await world.write(compensated(), "broken")
    good, altered = await world.write(compensated(), "good"), await world.write(compensated(), "altered")
    await world.tamper(of_instance(broken, **values), of_instance(altered, state={}))
    found = await world.findings()
    assert {saga_id for saga_id, _, _ in found} == {broken, altered}, f"not {good}"
    [detail] = [detail for saga_id, _, detail in found if saga_id == broken]
    assert detail.startswith("what is stored of it cannot be read: ")
    assert said in detail


# Decisions that were never made, in a history that is whole: a coordinator with a bug would write it


def entry(decisions: list[Decision], number: int, **values: Any) -> None:
    decisions[number] = replace(decisions[number], entry=replace(decisions[number].entry, **values))


def instance(decisions: list[Decision], **values: Any) -> None:
    decisions[-1] = replace(decisions[-1], instance=replace(decisions[-1].instance, **values))


def succeed_twice(decisions: list[Decision]) -> None:
    entry(decisions, 3, step="flight")


def begin_without_a_start(decisions: list[Decision]) -> None:
    entry(decisions, 0, kind="reply")


def go_on_after_the_end(decisions: list[Decision]) -> None:
    entry(decisions, 1, status=Status.COMPLETED)


def end_while_a_step_is_out(decisions: list[Decision]) -> None:
    steps = {**decisions[-1].instance.steps, "payment": StepState(StepStatus.RUNNING)}
    instance(decisions, steps=steps)


def wait_for_nothing(decisions: list[Decision]) -> None:
    steps = {
        name: replace(at, status=StepStatus.DECLINED, due_at=None) for name, at in decisions[-1].instance.steps.items()
    }
    instance(decisions, steps=steps, due_at=None)
    entry(decisions, -1, change={"steps": {name: at.to_json() for name, at in steps.items()}})


def forget_the_deadline(decisions: list[Decision]) -> None:
    instance(decisions, due_at=None)


def fire_too_early(decisions: list[Decision]) -> None:
    entry(decisions, 2, at=START)


def fire_without_a_deadline(decisions: list[Decision]) -> None:
    entry(decisions, 2, step="hotel")


def undo_what_was_never_done(decisions: list[Decision]) -> None:
    sent = {"id": str(_ids.new()), "type": "refund", "step": "payment", "direction": "undo"}
    entry(decisions, -1, sent=(sent,))


def do_after_the_undo(decisions: list[Decision]) -> None:
    sent = {"id": str(_ids.new()), "type": "book.hotel", "step": "hotel", "direction": "do"}
    entry(decisions, -1, sent=(sent,))


def leave_a_step_done(decisions: list[Decision]) -> None:
    steps = decisions[-1].instance.steps
    instance(decisions, steps={**steps, "hotel": replace(steps["hotel"], status=StepStatus.SUCCEEDED)})


@pytest.mark.parametrize(
    ("bug", "decisions", "invariant"),
    [
        (succeed_twice, completed, "I2"),
        (begin_without_a_start, completed, "I10"),
        (go_on_after_the_end, completed, "I10"),
        (end_while_a_step_is_out, completed, "I1"),
        (wait_for_nothing, running, "I1"),
        (forget_the_deadline, running, "I1"),
        (fire_too_early, compensated, "I12"),
        (fire_without_a_deadline, compensated, "I12"),
        (undo_what_was_never_done, compensated, "I3"),
        (leave_a_step_done, compensated, "I3"),
        (do_after_the_undo, compensated, "I4"),
    ],
)
async def test_what_a_coordinator_with_a_bug_would_write_is_found(
    world: World, bug: Callable[[list[Decision]], None], decisions: Callable[[], list[Decision]], invariant: str
) -> None:
    made = decisions()
    bug(made)
    saga_id = await world.write(made)
    found = await world.broken(saga_id)
    assert invariant in found
    assert "I13" not in found, "its history is whole"


async def test_i1_a_deadline_on_which_nobody_acts_is_found(world: World) -> None:
    await world.store.clock.calibrate()
    now = world.store.clock.now()
    late = await world.write(due_at(now - LATE - timedelta(minutes=1)), "late")
    await world.write(due_at(now - LATE + timedelta(minutes=1)), "soon")
    [found] = [each async for each in Verification(world.engine, world.clock).findings()]
    assert (found.saga_id, found.invariant) == (late, "I1")
    assert OVERDUE in found.detail


def due_at(moment: datetime) -> list[Decision]:
    decisions = running()
    steps = decisions[-1].instance.steps
    flight = replace(steps["flight"], due_at=moment)
    instance(decisions, due_at=moment, steps={**steps, "flight": flight})
    change = decisions[-1].entry.change
    entry(decisions, -1, change={**change, "steps": {**change["steps"], "flight": flight.to_json()}})
    return decisions


@pytest.mark.parametrize(("reply", "holds"), [(b"{}", False), (UNTRIED, True)], ids=["it was done", "it was barred"])
async def test_i4_a_command_that_was_handled_after_its_compensation_is_found(
    world: World, reply: bytes, holds: bool
) -> None:
    saga_id = await world.write(compensated())
    do, undo = (derive_id(SAGA_ID, "hotel", direction, 1) for direction in ("do", "undo"))
    rows = [
        {"message_key": key, "consumer": OF_SAGAS, "reply": value, "handled_at": START + timedelta(seconds=seconds)}
        for key, value, seconds in ((undo, b"{}", 10), (do, reply, 20))
    ]
    async with transaction(world.engine) as connection:
        await connection.execute(inbox.insert(), rows)
    assert await world.broken(saga_id) == (set() if holds else {"I4"})


async def test_only_what_has_moved_since_is_checked(world: World) -> None:
    old, new = await world.write(completed(), "old"), await world.write(completed(), "new")
    await world.tamper(
        *(of_history(each, 2, message_id="x") for each in (old, new)),
        of_instance(old, updated_at=START - timedelta(days=3)),
    )
    found = await world.findings(since=START - timedelta(days=1))
    assert {saga_id for saga_id, _, _ in found} == {new}


async def test_every_page_is_checked_to_its_last_saga(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.verification._PAGE", 2)
    monkeypatch.setattr("coordinator.verification._CHUNK", 1)
    ids = [await world.write(compensated(), f"{number}") for number in range(5)]
    await world.tamper(*(of_history(each, 3, message_id="x") for each in ids))
    assert {saga_id for saga_id, _, _ in await world.findings()} == set(ids)


async def test_a_check_sees_one_moment_whatever_is_written_meanwhile(
    world: World, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A saga that moves on between two looks of a check at it has neither lost rows nor got too many."""
    monkeypatch.setattr("coordinator.verification._PAGE", 1)
    decisions = completed()
    broken, moving = await world.write(completed(), "broken"), _ids.new()
    await world.tamper(of_history(broken, 2, message_id="x"))
    before, rows = chained(decisions[:2], moving, "moving")
    after, more = chained(decisions, moving, "moving")
    async with transaction(world.engine) as connection:
        await world.store.insert(connection, [before])
        await world.store.record(connection, rows)
    beside = open_database(database_url, read_only=True)
    found: list[Finding] = []
    async for each in Verification(beside, world.clock).findings():
        if not found:
            async with transaction(world.engine) as connection:
                await world.store.update(connection, [after], {moving: before})
                await world.store.record(connection, more[2:])
        found.append(each)
    await beside.dispose()
    assert {each.saga_id for each in found if OVERDUE not in each.detail} == {broken}
    assert (await world.store.find("moving")) == [after]
