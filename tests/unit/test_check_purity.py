"""The check that keeps clocks and randomness in their adapters."""

import pytest

from scripts.check_purity import check, is_adapter


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import time\ntime.monotonic()", "time.monotonic"),
        ("import time as t\nstart = t.time_ns()", "time.time_ns"),
        ("import time\n\nasync def f(clock=time.monotonic): ...", "time.monotonic"),
        ("from datetime import datetime\ndatetime.now(UTC)", "datetime.datetime.now"),
        ("import datetime as dt\ndt.datetime.utcnow()", "datetime.datetime.utcnow"),
        ("import datetime\ndatetime.date.today()", "datetime.date.today"),
        ("import asyncio\nawait asyncio.sleep(1)", "asyncio.sleep"),
        ("from asyncio import sleep", "asyncio.sleep"),
        ("import random", "random"),
        ("from random import Random", "random.Random"),
        ("import secrets", "secrets"),
        ("import os\nos.urandom(8)", "os.urandom"),
        ("from uuid import UUID, uuid4", "uuid.uuid4"),
        ("import uuid\nuuid.uuid7()", "uuid.uuid7"),
        ("loop.time()", "time.monotonic"),
        ("asyncio.get_running_loop().time()", "time.monotonic"),
        ("self._loop.time()", "time.monotonic"),
    ],
)
def test_impure_code_is_found(source: str, name: str) -> None:
    (finding,) = check(source, "events/relay.py")

    assert finding.startswith(f"events/relay.py:{len(source.splitlines())}: {name}: use the ")


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from datetime import UTC, datetime, timedelta\ndatetime.fromisoformat(text)",
        "from uuid import UUID\nUUID(int=7)",
        "self._clock.sleep(1); self._random.uniform(0, 1); clock.now(); clock.monotonic()",
        "moment.time()",
        "from events.ids import Random",
        "from .time import sleep",
        "import asyncio\nasyncio.timeout(1)",
    ],
)
def test_pure_code_passes(source: str) -> None:
    assert list(check(source, "events/relay.py")) == []


def test_adapters_are_named_by_path() -> None:
    assert is_adapter("events/clock.py")
    assert is_adapter("coordinator/demo/shop.py")
    assert not is_adapter("handlers/clock.py")
    assert not is_adapter("events/relay.py")
