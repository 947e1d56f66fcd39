"""A process whose event loop hangs ends, so that whoever supervises it can start it again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.base import wait_until
from tests.support.processes import Process, run

pytestmark = pytest.mark.acceptance

APP = """
import threading

from coordinator import App
from events import Event
from handlers import handles


class OrderPlaced(Event):
    order: str


@handles(OrderPlaced)
async def wait_for_godot(event: OrderPlaced) -> None:
    threading.Event().wait()


app = App("stuck", handlers=[wait_for_godot])
"""
ORDER = {"specversion": "1.0", "id": "1", "source": "/shop", "type": "order.placed", "data": {"order": "1"}}


def test_a_handler_that_blocks_for_ever_ends_the_process_and_its_stack_says_where(
    amqp_url: str, tmp_path: Path
) -> None:
    (tmp_path / "stuck.py").write_text(APP)
    (tmp_path / "order.json").write_text(json.dumps(ORDER))
    environment = {
        "COORDINATOR_BROKER_URL": amqp_url,
        "COORDINATOR_DATABASE_URL": f"sqlite:///{tmp_path / 'app.db'}",
        "COORDINATOR_MAX_STALL": "2",
        "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}",
    }
    with Process(tmp_path / "log", "run", "stuck:app", environment=environment) as process:
        wait_until(lambda: "is running" in process.log, "the application")
        elsewhere = {**environment, "COORDINATOR_DATABASE_URL": f"sqlite:///{tmp_path / 'publisher.db'}"}
        run("publish", str(tmp_path / "order.json"), environment=elsewhere)
        assert process.wait(60) == 1
        assert "in wait_for_godot" in process.log


STUBBORN = """
import asyncio

from coordinator import App
from events import Event
from handlers import handles


class OrderPlaced(Event):
    order: str


@handles(OrderPlaced, timeout=TIMEOUT)
async def never_end(event: OrderPlaced) -> None:
    print("never ends", flush=True)
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass


app = App("stubborn", handlers=[never_end])
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_handler_that_swallows_every_cancellation_does_not_outlive_its_limits(
    amqp_url: str, tmp_path: Path, stopped: bool
) -> None:
    """It keeps its slot for ever, or the whole process when that is asked to stop."""
    (tmp_path / "stubborn.py").write_text(STUBBORN.replace("TIMEOUT", "3600" if stopped else "0.5"))
    (tmp_path / "order.json").write_text(json.dumps(ORDER))
    environment = {
        "COORDINATOR_BROKER_URL": amqp_url,
        "COORDINATOR_DATABASE_URL": f"sqlite:///{tmp_path / 'app.db'}",
        "COORDINATOR_GRACE": "0.1",
        "COORDINATOR_MAX_STALL": "3",
        "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}",
    }
    with Process(tmp_path / "log", "run", "stubborn:app", environment=environment) as process:
        wait_until(lambda: "is running" in process.log, "the application")
        elsewhere = {**environment, "COORDINATOR_DATABASE_URL": f"sqlite:///{tmp_path / 'publisher.db'}"}
        run("publish", str(tmp_path / "order.json"), environment=elsewhere)
        wait_until(lambda: "never ends" in process.log, "the handler")
        assert (process.terminate(60) if stopped else process.wait(60)) == 1
        assert "the process ends without more ado" in process.log


def finished(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False, timeout=60
    )


def test_a_shutdown_in_time_is_left_alone() -> None:
    script = """
from coordinator.process import shutdown_within

for asked in (True, False):
    with shutdown_within(3600) as stopping:
        if asked:
            stopping()
"""
    done = finished(script)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_loop_that_stands_still_for_the_limit_ends_with_all_stacks() -> None:
    script = """
import asyncio, threading
from coordinator.process import exits_when_stalled
from events.clock import SystemClock

async def main():
    async with exits_when_stalled(0.5, SystemClock()):
        await asyncio.sleep(0)
        threading.Event().wait()

asyncio.run(main())
"""
    done = finished(script)
    assert done.returncode == 1
    assert done.stderr.startswith("Timeout (0:00:00.5")
    assert "in main" in done.stderr
