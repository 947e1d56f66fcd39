"""Retention, on both databases: what is written and deleted, and what must stay whatever happens."""

import gzip
import json
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, update

from coordinator.archive import Archive, Archived, ArchiveFile
from coordinator.instance import Origin, Status
from coordinator.sagas import ArchivedSagaError
from coordinator.store import Store
from coordinator.tables import saga_history, saga_instance, saga_item, saga_wait
from coordinator.verification import Verification
from events.database import transaction
from events.derive import derive_id
from events.errors import ConfigurationError, StaleRowError
from events.ids import TimeOrderedIds
from handlers.inbox import OF_SAGAS
from handlers.tables import inbox, retry
from tests.support.engines import World, actions, reply, wanted
from tests.support.flows import START, count_rows
from tests.support.histories import chained
from tests.support.sagas import FlightBooked, Run

_ids = TimeOrderedIds()
DAY = timedelta(days=1)
NOW = START + 100 * DAY


def completed() -> Run:
    run = Run()
    for step in ("hotel", "flight", "payment"):
        run.done(step, outcome=FlightBooked(ticket="x") if step == "flight" else None)
    return run


async def write(world: World, run: Run, key: str, ended: datetime = START, **fields: Any) -> UUID:
    """Write a saga whose last transition was then."""
    store = Store(world.engine, world.clock)
    run.decisions[-1] = replace(
        run.decisions[-1],
        instance=replace(run.instance, updated_at=ended, **fields),
        entry=replace(run.last.entry, at=ended),
    )
    instance, rows = chained(run.decisions, _ids.new(), key)
    async with transaction(world.engine) as connection:
        await store.insert(connection, [instance])
        await store.record(connection, rows)
    return instance.id


async def archive(world: World, file: ArchiveFile | None, *, days: int = 30, keys: int = 365) -> Archived:
    archiving = Archive(world.engine, world.clock, before=NOW - days * DAY, keys_before=NOW - keys * DAY)
    async for _ in archiving.run(file):
        pass
    return archiving.done


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


async def statuses(world: World) -> dict[str, str]:
    async with transaction(world.engine) as connection:
        rows = await connection.execute(select(saga_instance.c.key, saga_instance.c.status))
        return {row.key: row.status for row in rows}


async def test_what_has_ended_long_ago_is_written_and_deleted_and_nothing_else(world: World, tmp_path: Path) -> None:
    stuck = Run()
    stuck.done("hotel")
    old = {
        "completed": await write(world, completed(), "completed"),
        "running": await write(world, Run(), "running"),
        "stuck": await write(world, stuck, "stuck", status=Status.NEEDS_ATTENTION, due_at=None),
        "young": await write(world, completed(), "young", ended=NOW - 29 * DAY),
    }
    world.tamper(old["stuck"])
    handled = [
        {"message_key": key, "consumer": consumer, "handled_at": at}
        for key, consumer, at in (
            (derive_id(Run().instance.id, "hotel", "do", 1), OF_SAGAS, START),
            (derive_id(Run().instance.id, "flight", "do", 1), OF_SAGAS, NOW),
            (uuid4(), OF_SAGAS, START),
        )
    ]
    async with transaction(world.engine) as connection:
        await connection.execute(inbox.insert(), handled)
    path = tmp_path / "old.jsonl.gz"
    with ArchiveFile(path) as file:
        assert await archive(world, file) == Archived(sagas=1)
    [written] = lines(path)
    assert (written["id"], written["key"], written["status"]) == (str(old["completed"]), "completed", "completed")
    assert [row["revision"] for row in written["history"]] == [1, 2, 3, 4]
    assert written["head"] == written["history"][-1]["hash"]
    expected = {"completed": "archived", "running": "running", "stuck": "needs_attention", "young": "completed"}
    assert await statuses(world) == expected
    async with transaction(world.engine) as connection:
        left = set((await connection.execute(select(saga_history.c.saga_id).distinct())).scalars())
        assert left == {old["running"], old["stuck"], old["young"]}
        [row] = (await connection.execute(saga_instance.select().where(saga_instance.c.key == "completed"))).all()
        assert (row.state, row.steps, row.head.hex()) == ({}, {}, written["head"])
        kept = set((await connection.execute(select(inbox.c.message_key))).scalars())
    assert kept == {handled[1]["message_key"], handled[2]["message_key"]}, "only what is old, and of this saga"
    with ArchiveFile(path) as file:
        assert await archive(world, file) == Archived()
    assert len(lines(path)) == 1


async def test_a_start_with_the_key_of_an_archived_saga_is_a_duplicate(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await write(world, completed(), "t-1")
    await archive(world, None)
    coordinator = await world.coordinator()
    caplog.set_level("INFO")
    await coordinator.take(wanted())
    assert await statuses(world) == {"t-1": "archived"}
    assert "saga.duplicate_start" in actions(caplog)
    assert await world.sent() == []


async def test_who_has_read_a_saga_before_it_was_archived_writes_nothing_over_it(world: World) -> None:
    saga_id = await write(world, completed(), "t-1")
    store = Store(world.engine, world.clock)
    async with transaction(world.engine) as connection:
        read = await store.load(connection, [saga_id], lock=False)
    await archive(world, None)
    with pytest.raises(StaleRowError):
        async with transaction(world.engine) as connection:
            await store.update(connection, [replace(read[saga_id], revision=read[saga_id].revision + 1)], read)
    assert await statuses(world) == {"t-1": "archived"}


async def test_a_reply_to_an_archived_saga_is_kept_for_a_person(world: World) -> None:
    saga_id = await write(world, completed(), "t-1")
    await archive(world, None)
    coordinator = await world.coordinator()
    late = reply(saga_id, "hotel")
    await coordinator.take(late)
    assert list((await world.dead()).values()) == [ArchivedSagaError.code]
    assert await statuses(world) == {"t-1": "archived"}


async def test_a_key_is_free_when_it_is_kept_no_longer(world: World) -> None:
    await write(world, completed(), "t-1")
    assert await archive(world, None, days=10, keys=100) == Archived(sagas=1)
    assert await archive(world, None, days=10, keys=99) == Archived(forgotten=1)
    assert await statuses(world) == {}
    coordinator = await world.coordinator()
    await coordinator.take(wanted())
    assert await statuses(world) == {"t-1": "running"}


@pytest.mark.parametrize("parent_status", [Status.RUNNING, Status.COMPENSATING, Status.NEEDS_ATTENTION])
async def test_a_child_stays_as_long_as_its_parent_may_want_it_undone(world: World, parent_status: Status) -> None:
    parent = await write(world, Run(), "parent", status=parent_status)
    world.tamper(parent)
    origin = Origin(parent, "ship", 1, "coordinator")
    await write(world, completed(), "child", origin=origin)
    await write(world, completed(), "orphan", origin=replace(origin, saga_id=uuid4()))
    assert await archive(world, None) == Archived(sagas=1, held=1)
    assert (await statuses(world))["child"] == "completed"
    async with transaction(world.engine) as connection:
        ended = update(saga_instance).where(saga_instance.c.id == parent).values(status="completed", updated_at=NOW)
        await connection.execute(ended)
    assert await archive(world, None) == Archived(sagas=1)
    assert await statuses(world) == {"parent": "completed", "child": "archived", "orphan": "archived"}


async def test_a_saga_stays_as_long_as_one_of_its_messages_waits(world: World) -> None:
    saga_id = await write(world, completed(), "t-1")
    waiting: dict[str, Any] = {column.name: None for column in retry.c if column.nullable}
    waiting |= {"id": uuid4(), "consumer": "x", "message_key": uuid4(), "body": b"", "headers": {}, "message_id": "m"}
    waiting |= {
        "message_type": "t",
        "saga_id": saga_id,
        "attempts": 1,
        "crashes": 0,
        "first_at": START,
        "due_at": START,
    }
    async with transaction(world.engine) as connection:
        await connection.execute(retry.insert().values(waiting))
    assert await archive(world, None) == Archived(held=1)
    async with transaction(world.engine) as connection:
        await connection.execute(retry.delete())
    assert await archive(world, None) == Archived(sagas=1)


async def test_all_that_belongs_to_a_saga_goes_with_it(world: World, tmp_path: Path) -> None:
    saga_id = await write(world, completed(), "t-1")
    item = {"id": uuid4(), "saga_id": saga_id, "step": "hotel", "number": 3, "status": "succeeded", "state": {"x": 1}}
    wait = {"id": uuid4(), "correlation": uuid4(), "saga_id": saga_id, "step": "w", "event": "e", "since": START}
    async with transaction(world.engine) as connection:
        await connection.execute(saga_item.insert().values(item))
        await connection.execute(saga_wait.insert().values(wait))
    with ArchiveFile(tmp_path / "a.gz") as file:
        await archive(world, file)
    [written] = lines(tmp_path / "a.gz")
    assert [(row["step"], row["number"], row["state"]) for row in written["saga_item"]] == [("hotel", 3, {"x": 1})]
    for table in (saga_history, saga_item, saga_wait):
        assert await count_rows(world.engine, table) == 0


class Dying(ArchiveFile):
    """Dies when a batch is on disk, or with half of it."""

    def __init__(self, path: Path, *, half: bool) -> None:
        super().__init__(path)
        self._half = half

    def append(self, documents: Any) -> None:
        super().append(documents)
        if self._half:
            self._file.truncate(self._file.tell() - 7)
        raise RuntimeError("the power is off")


@pytest.mark.parametrize("half", [True, False], ids=["with half a batch", "before the commit"])
async def test_who_died_between_writing_and_deleting_loses_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    monkeypatch.setattr("coordinator.archive._PAGE", 2)
    path = tmp_path / "old.jsonl.gz"
    keys = [f"t-{number}" for number in range(5)]
    for key in keys[:2]:
        await write(world, completed(), key)
    with ArchiveFile(path) as file:
        assert await archive(world, file) == Archived(sagas=2)
    for key in keys[2:]:
        await write(world, completed(), key)
    with pytest.raises(RuntimeError), Dying(path, half=half) as file:
        await archive(world, file)
    assert sorted(status for status in (await statuses(world)).values()) == ["archived"] * 2 + ["completed"] * 3
    with ArchiveFile(path) as file:
        assert await archive(world, file) == Archived(sagas=3)
    written = [each["key"] for each in lines(path)]
    assert written == [*keys[:2], *keys[2:4], *([] if half else keys[2:4]), keys[4]]
    assert set((await statuses(world)).values()) == {"archived"}


async def test_a_saga_that_is_woken_before_its_row_is_locked_stays(world: World) -> None:
    """It was found as ended, and goes on meanwhile."""
    await write(world, completed(), "t-1")
    archiving = Archive(world.engine, world.clock, before=NOW, keys_before=START)
    found = await world.instance()
    assert archiving._has_ended(found)
    assert not archiving._has_ended(replace(found, status=Status.COMPENSATING))
    assert not archiving._has_ended(replace(found, updated_at=NOW))


async def test_an_archived_saga_breaks_no_invariant(world: World) -> None:
    await write(world, completed(), "t-1")
    await write(world, completed(), "t-2", ended=NOW)
    await archive(world, None)
    verification = Verification(world.engine, world.clock)
    assert [each async for each in verification.findings()] == []
    assert verification.checked.sagas == 1


async def test_a_dry_run_counts_and_changes_nothing(world: World) -> None:
    await write(world, completed(), "t-1")
    await write(world, completed(), "t-2", ended=NOW)
    archiving = Archive(world.engine, world.clock, before=NOW - 30 * DAY, keys_before=NOW - 365 * DAY)
    assert await archiving.count() == (1, 0)
    async with transaction(world.engine) as connection:
        assert (await connection.execute(select(func.count()).select_from(saga_history))).scalar_one() == 8


def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("dear ada")
    with pytest.raises(ConfigurationError, match="is no archive"), ArchiveFile(path):
        pass
    assert path.read_text() == "dear ada"


def test_a_file_that_is_damaged_before_its_end_keeps_the_sagas_behind(tmp_path: Path) -> None:
    """They are in no database any more: what looks like half a batch may be cut off at the end only."""
    path = tmp_path / "old.jsonl.gz"
    with ArchiveFile(path) as file:
        for number in range(3):
            file.append([{"number": number, "filler": str(uuid4())} for _ in range(50)])
    content = bytearray(path.read_bytes())
    second = content.index(b"\x1f\x8b\x08", 1)
    content[second + 100] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"damaged at byte {second}, and has more"), ArchiveFile(path):
        pass
    assert path.read_bytes() == content


@pytest.mark.parametrize("tail", [b"\x1f\x8b\x08 and so on", b"\0" * 5000], ids=["half a batch", "zeros"])
def test_what_a_crash_has_left_at_the_end_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "old.jsonl.gz"
    with ArchiveFile(path) as file:
        file.append([{"number": 1}])
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with ArchiveFile(path):
        pass
    assert path.read_bytes() == whole


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere/a\.gz cannot be written: No such"):
        ArchiveFile(tmp_path / "nowhere" / "a.gz").__enter__()


def test_two_processes_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    with ArchiveFile(path), pytest.raises(ConfigurationError, match="another process"), ArchiveFile(path):
        pass


def test_keys_are_kept_as_long_as_sagas() -> None:
    with pytest.raises(ConfigurationError, match="kept at least as long"):
        Archive(None, None, before=START, keys_before=NOW)  # type: ignore[arg-type]  # it is refused before
