"""Processes of this project, as an operator starts them, and killed as the kernel kills them."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil

COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'coordinator'; from coordinator.cli import main; main()"]


class Process:
    """A `coordinator ...` process; ended with the `with` block."""

    def __init__(self, log: Path, *arguments: str, environment: Mapping[str, str]) -> None:
        self._log = log
        self._arguments = arguments
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*COMMAND, *self._arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
        return self

    @property
    def has_ended(self) -> bool:
        """Whether it was started and is no more."""
        return self._process is not None and self._process.poll() is not None

    @property
    def is_stopped(self) -> bool:
        """Whether it stands still, after a SIGSTOP."""
        return (
            self._process is not None
            and not self.has_ended
            and psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED
        )

    def resume(self) -> None:
        """Let it go on after a SIGSTOP."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill9(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart_after_kill9(self) -> None:
        self.kill9()
        self.start()

    def terminate(self, seconds: float = 30) -> int:
        """Ask it to stop; return its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(seconds)

    def interrupt(self, seconds: float = 30) -> int:
        """Press Ctrl-C; return its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(seconds)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill9()


def run(*arguments: str, environment: Mapping[str, str]) -> str:
    """Run a command to its end and return what it printed; a failure is an error that shows what it said."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
