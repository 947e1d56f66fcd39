"""Ids: fresh ones that sort by time, and ids that follow from others."""

import time
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.derive import derive_id, identify
from events.ids import TimeOrderedIds, system_random

PARENT = UUID("01900000-0000-7000-8000-000000000001")


def test_fresh_ids_are_uuids_of_version_7_with_the_time_in_front() -> None:
    before = time.time_ns() // 1_000_000
    ids = [TimeOrderedIds().new() for _ in range(1000)]
    after = time.time_ns() // 1_000_000
    assert len(set(ids)) == 1000
    for each in ids:
        assert each.version == 7
        assert each.variant == "specified in RFC 4122"
        assert before <= each.int >> 80 <= after


def test_fresh_ids_vary_in_all_random_bits() -> None:
    ids = [TimeOrderedIds().new().int for _ in range(1000)]
    ones, zeros = 0, 0
    for each in ids:
        ones |= each
        zeros |= ~each
    random_bits = (0xFFF << 64) | ((1 << 62) - 1)
    assert ones & zeros & random_bits == random_bits


def test_ids_made_one_after_another_are_in_order_within_a_millisecond_and_when_the_clock_is_set_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dead letters of one saga that were written together were replayed in any order."""
    ids, now = TimeOrderedIds(), 1_800_000_000_000_000_000
    made = []
    for step in (0, 0, -5_000_000_000, 1_000_000):
        monkeypatch.setattr(time, "time_ns", lambda step=step: now + step)
        made += [ids.new() for _ in range(1000)]
    assert made == sorted(set(made))
    assert len(made) == 4000
    assert {each.version for each in made} == {7}
    assert {each.variant for each in made} == {"specified in RFC 4122"}
    assert made[-1].int >> 80 == now // 1_000_000 + 1


def test_a_derived_id_is_the_same_every_time_and_in_every_release() -> None:
    derived = derive_id(PARENT, "charge", "do", 1)
    assert derived == derive_id(PARENT, "charge", "do", 1)
    assert derived.version == 8
    assert derived.variant == "specified in RFC 4122"
    assert str(derived) == "01900000-0000-8473-849d-010d4fda1c9e"


def test_a_derived_id_is_near_its_parent() -> None:
    assert derive_id(PARENT, "a").int >> 80 == PARENT.int >> 80


@given(
    st.lists(st.text(max_size=5) | st.integers(), max_size=4), st.lists(st.text(max_size=5) | st.integers(), max_size=4)
)
def test_other_parts_make_another_id(one: list[str | int], other: list[str | int]) -> None:
    same = [str(part) for part in one] == [str(part) for part in other]
    has_separator = any("\0" in str(part) for part in [*one, *other])
    if not has_separator:
        assert (derive_id(PARENT, *one) == derive_id(PARENT, *other)) is same


def test_another_parent_makes_another_id() -> None:
    assert derive_id(PARENT, "a") != derive_id(UUID(int=PARENT.int + 1), "a")


@given(st.uuids())
def test_a_canonical_uuid_identifies_itself(value: UUID) -> None:
    assert identify("/anywhere", str(value)) == value


@given(st.text(), st.text())
def test_any_text_identifies_something(source: str, name: str) -> None:
    assert identify(source, name) == identify(source, name)


def test_the_line_between_source_and_id_counts() -> None:
    assert identify("/a", "b/c") != identify("/a/b", "c")


def test_jitter_stays_within_its_bounds() -> None:
    drawn = [system_random().uniform(1, 2) for _ in range(100)]
    assert all(1 <= each <= 2 for each in drawn)
    assert len(set(drawn)) > 1
