"""A small process beside the tests that ends their servers when the tests themselves no longer can.

A run that is killed, or ended by `timeout`, does not come to its teardown. The guardian reads from a pipe which
programs are there ("+ PID FOLDER") and which have ended ("- PID"). However the run ends, the pipe ends with it.
"""

import atexit
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil


class Guardian:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a signal to the run and all its children is not for this one
        )
        atexit.register(self.close)

    def watch(self, pid: int, folder: Path) -> None:
        self._say(f"+ {pid} {folder}")

    def forget(self, pid: int) -> None:
        self._say(f"- {pid}")

    def close(self) -> None:
        self._process.communicate()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()


@cache
def guardian() -> Guardian:
    """The one of this process, started when first needed."""
    return Guardian()


def kill_tree(pid: int) -> None:
    """Kills a program and all that it has started, and waits until they are gone.

    Not the process group: both servers give their children sessions of their own.
    """
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        family = [top, *top.children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    end = time.monotonic() + 10
    while any(_alive(member) for member in family) and time.monotonic() < end:
        time.sleep(0.01)


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def main() -> None:
    watched: dict[int, str] = {}
    for line in sys.stdin:
        sign, pid, *folder = line.rstrip("\n").split(" ", 2)
        if sign == "+":
            watched[int(pid)] = folder[0]
        else:
            watched.pop(int(pid), None)
    for pid in watched:
        kill_tree(pid)
    for path in set(watched.values()):
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
