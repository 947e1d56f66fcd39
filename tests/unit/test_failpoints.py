"""Fail points: named places where a test can make the process die."""

import re
from pathlib import Path

import pytest

from events.failpoints import NAMES, armed, failpoint

ROOT = Path(__file__).parents[2]


def test_the_list_of_names_is_that_of_the_code() -> None:
    code = [path.read_text() for part in ("events", "handlers", "coordinator") for path in (ROOT / part).rglob("*.py")]
    assert set(re.findall(r'await failpoint\("([^"]+)"\)', "\n".join(code))) == NAMES


async def test_a_fail_point_does_what_is_armed_for_as_long_as_it_is() -> None:
    reached = []

    async def act() -> None:
        reached.append("yes")

    with armed("relay.claimed", act):
        await failpoint("relay.claimed")
        await failpoint("relay.after_confirm")
    await failpoint("relay.claimed")
    assert reached == ["yes"]


def test_a_name_that_no_code_has_cannot_be_armed() -> None:
    async def act() -> None:
        raise AssertionError

    with pytest.raises(KeyError, match="nowhere"), armed("relay.nowhere", act):
        raise AssertionError
