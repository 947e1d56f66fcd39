"""Processes of this project, as an operator starts them, and killed as the kernel kills them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Self

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

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill9()


_LOADED = ["coordinator.cli", "asyncpg", "sqlalchemy.dialects.postgresql.asyncpg", "aio_pika", "dishka", "pytest"]
_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(_LOADED)


class ForkedProcess:
    """A `coordinator ...` process that has its libraries already: it starts in a fiftieth of the time.

    It is forked from a server process of `multiprocessing`, and has read nothing of its application or environment
    before. May be used in threads.
    """

    _one_at_a_time = threading.Lock()  # `multiprocessing` looks after all of its children whenever one is started

    def __init__(self, log: Path, *arguments: str, environment: Mapping[str, str]) -> None:
        self._log = log
        self._call = (str(log), arguments, dict(environment))
        self._process = self._start()

    def _start(self) -> multiprocessing.process.BaseProcess:
        process = _fork.Process(target=_command_line, args=self._call, daemon=True)
        with self._one_at_a_time:
            process.start()
        return process

    @property
    def exit_code(self) -> int | None:
        """None while it runs; the negative number of the signal that has ended it."""
        with self._one_at_a_time:
            return self._process.exitcode

    def restart(self) -> None:
        """Start it again; it must have ended."""
        self._process = self._start()

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        with self._one_at_a_time:
            self._process.terminate()

    def kill9(self) -> None:
        with self._one_at_a_time:
            self._process.kill()
            self._process.join()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""


def _command_line(log: str, arguments: tuple[str, ...], environment: Mapping[str, str]) -> None:
    """Become a `coordinator ...` process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.environ.update(environment)
    sys.argv = ["coordinator", *arguments]
    from coordinator.cli import main  # noqa: PLC0415  # not in the process of the tests

    main()


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
