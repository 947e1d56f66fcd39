"""Processes of this project, as an operator starts them, and killed as the kernel kills them."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Self

import psutil

from tests.support.forks import Fork, fork_server

COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'coordinator'; from coordinator.cli import main; main()"]


class Process:
    """A `coordinator ...` process; ended with the `with` block. A fresh one imports all by itself."""

    def __init__(self, log: Path, *arguments: str, environment: Mapping[str, str], fresh: bool = False) -> None:
        self._log = log
        self._arguments = arguments
        self._environment = {**os.environ, **environment}
        self._fresh = fresh
        self._process: subprocess.Popen[bytes] | Fork | None = None

    def start(self) -> Self:
        with self._log.open("ab") as log, Path(os.devnull).open("rb") as nothing:
            self._process = _start(
                self._arguments, environment=self._environment, files=(nothing, log, log), fresh=self._fresh
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

    def wait(self, seconds: float = 30) -> int:
        """Return the exit code when it has ended."""
        assert self._process is not None
        return self._process.wait(seconds)

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


def finish(
    *arguments: str, environment: Mapping[str, str], given: str = "", fresh: bool = False, seconds: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(given.encode())
        stdin.seek(0)
        process = _start(
            arguments, environment={**os.environ, **environment}, files=(stdin, stdout, stderr), fresh=fresh
        )
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode())
        return subprocess.CompletedProcess(arguments, code, *said)


def run(*arguments: str, environment: Mapping[str, str], fresh: bool = False) -> str:
    """Run a command to its end and return what it printed; a failure is an error that shows what it said."""
    done = finish(*arguments, environment=environment, fresh=fresh)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _start(
    arguments: tuple[str, ...],
    *,
    environment: Mapping[str, str],
    files: tuple[IO[bytes], IO[bytes], IO[bytes]],
    fresh: bool,
) -> subprocess.Popen[bytes] | Fork:
    stdin, stdout, stderr = files
    if fresh:
        return subprocess.Popen([*COMMAND, *arguments], stdin=stdin, stdout=stdout, stderr=stderr, env=environment)
    return fork_server().start(arguments, environment=environment, stdin=stdin, stdout=stdout, stderr=stderr)
