"""The processes of the acceptance tests are what processes of an operator are."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.base import wait_until
from tests.support.processes import Process, finish

pytestmark = pytest.mark.acceptance

APP = """
import json, os, sys
from pathlib import Path
from coordinator import App

Path(os.environ["SEEN"]).write_text(json.dumps([os.getpid(), os.environ["COLUMNS"], sys.argv, sys.stdin.read()]))
app = App("shop")
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "shop.py").write_text(APP)
    return {
        "COLUMNS": "77",
        "COORDINATOR_DATABASE_URL": f"sqlite:///{tmp_path / 'coordinator.db'}",
        "PYTHONPATH": str(tmp_path),
        "SEEN": str(tmp_path / "seen"),
    }


@pytest.mark.parametrize("fresh", [True, False])
def test_a_process_has_its_own_environment_arguments_input_and_exit_code(
    environment: dict[str, str], tmp_path: Path, fresh: bool
) -> None:
    pids = set()
    for given in ("one", "two"):
        asked = ("run", "shop:app", "--handler", given)
        done = finish(*asked, environment=environment, given=given, fresh=fresh)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"error: shop has no handler called {given}\n"
        pid, columns, arguments, read = json.loads((tmp_path / "seen").read_text())
        assert (columns, arguments, read) == ("77", ["coordinator", *asked], given)
        pids.add(pid)
    assert len(pids | {os.getpid()}) == 3
    assert finish("nonsense", environment={}, fresh=fresh).stderr.startswith("Usage: coordinator [OPTIONS] COMMAND")


@pytest.mark.parametrize("fresh", [True, False])
def test_a_process_ends_as_it_is_told(environment: dict[str, str], tmp_path: Path, fresh: bool) -> None:
    process = Process(tmp_path / "log", "run", "shop:app", environment=environment, fresh=fresh)
    with process:
        for end, code in ((process.terminate, 0), (process.interrupt, 0), (process.kill9, None)):
            wait_until(lambda: "is running" in process.log, "the process")
            assert not process.has_ended
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0)
            assert end() == code
            assert process.has_ended
            (tmp_path / "log").unlink()
            process.start()
    assert process.wait() == -signal.SIGKILL
