"""`coordinator ...` processes that start at once: forks of one that has imported everything.

A process of ours imports for more than a second before it does anything, and the acceptance tests start hundreds. A
fork is as much a process as any other: it has its own memory, environment, files, signals and exit code.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple, NoReturn, Self

ROOT = Path(__file__).parents[2]
IMPORTED = ("coordinator.cli", "sqlalchemy.dialects.postgresql.asyncpg", "sqlalchemy.dialects.sqlite.aiosqlite")
_NUMBER = struct.Struct("!i")


class Fork:
    """A process, with the part of the interface of `subprocess.Popen` that the tests need."""

    def __init__(self, pid: int, server: socket.socket) -> None:
        self.pid = pid
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs; of one that was killed it is the signal's number, negative."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        if self._code is None:
            self._server.settimeout(timeout)
            try:
                self._code = _receive(self._server)
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired("coordinator", timeout or 0) from None
            self._server.close()
        return self._code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The process whose forks they are; it ends with this one."""

    def __init__(self) -> None:
        self._control, end = socket.socketpair()
        with end:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main({end.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[end.fileno()],
                cwd=ROOT,
                # What the modules look up as they are imported would be the same for all.
                env={name: value for name, value in os.environ.items() if name != "COLUMNS"},
            )
        self._lock = threading.Lock()
        atexit.register(self.close)

    def start(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        stdin: IO[bytes],
        stdout: IO[bytes],
        stderr: IO[bytes],
    ) -> Fork:
        """Start `coordinator ARGUMENTS...` in the current folder."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            files = [theirs.fileno(), *(file.fileno() for file in (stdin, stdout, stderr))]
            socket.send_fds(self._control, [b"+"], files)
        task = {"arguments": list(arguments), "environment": dict(environment), "folder": str(Path.cwd())}
        ours.sendall(json.dumps(task).encode())
        ours.shutdown(socket.SHUT_WR)
        return Fork(_receive(ours), ours)

    def close(self) -> None:
        self._control.close()
        self._process.wait()


@cache
def _fork_server() -> ForkServer:
    return ForkServer()


_starting = threading.Lock()


def fork_server() -> ForkServer:
    """The one of this process, started when first needed."""
    with _starting:
        return _fork_server()


class _Request(NamedTuple):
    answers: int
    stdin: int
    stdout: int
    stderr: int

    @classmethod
    def receive(cls, control: socket.socket) -> Self | None:
        _, files, _, _ = socket.recv_fds(control, 1, len(cls._fields))
        return cls(*files) if files else None

    def close(self) -> None:
        for each in self:
            os.close(each)


def main(control: int) -> None:
    """Fork for every request that comes in on this socket, until it is closed."""
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # a collection would copy the pages that the forks share
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then ends the processes
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=control) as requests:
        while request := _Request.receive(requests):
            if os.fork() == 0:
                break
            request.close()
    if request:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _watch_or_become(request)
        importlib.import_module("coordinator.cli").main()


def _watch_or_become(request: _Request) -> None:
    """Fork once more: the parent stays, to say with which code the child ends; the child returns."""
    with socket.socket(fileno=request.answers) as answers:
        with answers.makefile("rb") as asked:
            task = json.load(asked)
        if pid := os.fork():
            for each in request[1:]:
                os.close(each)
            _watch(pid, answers)
    for number, each in enumerate(request[1:]):
        os.dup2(each, number)
        os.close(each)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(task["folder"])
    os.environ.clear()
    os.environ.update(task["environment"])
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = ["coordinator", *task["arguments"]]


def _watch(pid: int, answers: socket.socket) -> NoReturn:
    answers.sendall(_NUMBER.pack(pid))
    _, status = os.waitpid(pid, 0)
    try:
        answers.sendall(_NUMBER.pack(os.waitstatus_to_exitcode(status)))
    finally:
        os._exit(0)


def _receive(server: socket.socket) -> int:
    """A number is sent in one piece, and so it arrives."""
    number: int
    (number,) = _NUMBER.unpack(server.recv(_NUMBER.size))
    return number
