"""The hash of a row of history: it says all of the row, and all that was before."""

from datetime import UTC, datetime, timedelta, timezone
from hashlib import sha256
from typing import Any
from uuid import UUID

import pytest

from coordinator.chain import COLUMNS, GENESIS, history_row, seal
from coordinator.decision import HistoryEntry
from coordinator.instance import Status
from events.envelope import Direction, Result

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
SAGA = UUID("01a20000-0000-7000-8000-000000000001")
ENTRY = HistoryEntry(
    kind="reply",
    at=MOMENT,
    status=Status.RUNNING,
    step="hotel",
    direction=Direction.DO,
    attempt=1,
    result=Result.SUCCEEDED,
    message_id="m-1",
    reason="é",
    change={"state": {"amount": 1.5}},
    sent=({"id": "c-1"},),
    actor="ada",
    why="because",
)


def row(**changes: Any) -> list[Any]:
    values = history_row(SAGA, 2, ENTRY, given='{"type":"x"}', head=GENESIS)
    return [changes.get(name, value) for name, value in zip(COLUMNS, values, strict=False)]


def test_the_hash_is_what_the_documentation_says() -> None:
    """Anybody can check it, with any tool."""
    columns = (
        '"01a20000000070008000000000000001","2","reply","1767323045678901","running","hotel","do","1","succeeded"'
        ',"m-1","é","ada",null,"{\\"type\\":\\"x\\"}","{\\"state\\":{\\"amount\\":1.5}}"'
        ',"[{\\"id\\":\\"c-1\\"}]"]'
    )
    first = sha256(f'["",{columns}'.encode()).digest()
    assert seal(GENESIS, row(why=None)) == first
    assert seal(first, row(why=None)) == sha256(f'["{first.hex()}",{columns}'.encode()).digest()


@pytest.mark.parametrize("name", COLUMNS)
def test_a_change_of_any_column_changes_the_hash(name: str) -> None:
    others: dict[str, Any] = {"saga_id": UUID(int=7), "revision": 3, "at": MOMENT + timedelta(microseconds=1)}
    assert seal(GENESIS, row(**{name: others.get(name, "other")})) != seal(GENESIS, row())
    if name not in others:
        assert seal(GENESIS, row(**{name: None})) != seal(GENESIS, row(**{name: ""}))


def test_text_cannot_move_from_one_column_to_the_next() -> None:
    assert seal(GENESIS, row(actor="a", why="bc")) != seal(GENESIS, row(actor="ab", why="c"))
    assert seal(GENESIS, row(actor="1:b", why=None)) != seal(GENESIS, row(actor=None, why="1:b"))


def test_a_hash_says_what_was_before() -> None:
    assert seal(b"one", row()) != seal(b"two", row()) != seal(GENESIS, row())


def test_the_same_moment_has_the_same_hash_in_every_zone() -> None:
    elsewhere = MOMENT.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert seal(GENESIS, row(at=elsewhere)) == seal(GENESIS, row())
