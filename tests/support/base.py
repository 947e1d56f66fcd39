"""What every server of the tests can do, wherever it comes from."""

import base64
import json
import os
import random
import socket
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import quote, unquote, urlsplit
from uuid import uuid4

import psycopg
from psycopg import sql


class MissingServerError(Exception):
    """No server of this kind can be had from this source; the text says what would help."""


_PORTS = range(20_000, 32_000)  # below the ephemeral range, so that no client's socket takes one in the meantime
_given: set[int] = set()


def own_ports(environment: Mapping[str, str]) -> range:
    """The ports that this process may give away: of several that run tests side by side each has its own."""
    workers = int(environment.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    number = int(environment.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = len(_PORTS) // workers
    return _PORTS[number % workers * share :][:share]


def free_port() -> int:
    """A port to listen on.

    No port is given twice: a server takes all of its ports before it listens on the first, and keeps them while it is
    stopped.
    """
    ports = own_ports(os.environ)
    while True:
        port = random.choice(ports)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port


def wait_until(ready: Callable[[], bool], what: str, seconds: float = 90) -> None:
    """Asks again and again; a refused connection counts as not ready yet."""
    end = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except OSError:
            pass
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come up within {seconds:.0f} s")
        time.sleep(0.05)


class Server(ABC):
    """A server that can be stopped, killed and started again with its data, at the same address."""

    source: str
    """Where it comes from, for the summary."""

    @property
    @abstractmethod
    def url(self) -> str: ...

    @property
    @abstractmethod
    def running(self) -> bool: ...

    @abstractmethod
    def start(self) -> None:
        """Returns when the server answers; does nothing while it runs."""

    @abstractmethod
    def stop(self) -> None:
        """A clean shutdown: the server may finish what it has begun."""

    @abstractmethod
    def kill9(self) -> None:
        """The server's machine has gone: nothing more is written, nobody is told."""

    @abstractmethod
    def close(self) -> None:
        """Ends the server and removes its data."""

    def restart(self) -> None:
        self.stop()
        self.start()


class RabbitMQ(Server):
    """A broker. Tests share one and are kept apart by a virtual host each, in 0.05 s where a broker takes 5 s."""

    @property
    @abstractmethod
    def management_url(self) -> str | None:
        """The management API without credentials, or None where the server has none that answers."""

    @abstractmethod
    def control(self, *arguments: str) -> None:
        """Runs rabbitmqctl; raises if that fails."""

    @abstractmethod
    def pause(self) -> None:
        """Stops the broker in its tracks: its connections stay, and nobody answers on them."""

    @abstractmethod
    def resume(self) -> None:
        """Lets a paused broker go on."""

    def flush(self) -> None:
        """Writes the broker's tables to disk, to be called between declaring a quorum queue and kill9().

        RabbitMQ writes the directory of its Raft groups up to a second late: a quorum queue younger than that comes
        back empty and without a leader, although its publishes were confirmed. That is the broker's, not ours to test.
        """
        self.control("eval", "[dets:sync(T) || T <- dets:all()].")

    @contextmanager
    def vhost(self) -> Iterator[str]:
        """The url of a new virtual host, removed afterwards; the server's own url where there is no management API."""
        if self.management_url is None:
            yield self.url
            return
        name = f"test-{uuid4().hex[:12]}"
        parts = urlsplit(self.url)
        self._make_vhost(name)
        try:
            yield parts._replace(path=f"/{name}").geturl()
        finally:
            if self.running:  # a test that killed the broker for good leaves nothing to tidy up
                self.manage("DELETE", f"vhosts/{name}")

    def reset(self, url: str) -> None:
        """Removes all that there is, as if its disk were new, and makes the virtual host of this url again, empty.

        To remove a virtual host and to make it again at once is not the same: who reconnects in between may leave
        bindings that RabbitMQ lists and does not route by.
        """
        for command in ("stop_app", "reset", "start_app"):
            self.control(command)
        wait_until(self.management_answers, "the management API")
        self._make_vhost(urlsplit(url).path.removeprefix("/"))

    def _make_vhost(self, name: str) -> None:
        self.manage("PUT", f"vhosts/{name}")
        self.manage(
            "PUT",
            f"permissions/{name}/{quote(self._user, safe='')}",
            {"configure": ".*", "write": ".*", "read": ".*"},
        )

    def manage(self, method: str, path: str, body: object = None) -> object:
        """A call of the management API; `path` comes after /api/. Returns the decoded answer, None if it is empty."""
        credentials = base64.b64encode(f"{self._user}:{self._password}".encode()).decode()
        request = urllib.request.Request(
            f"{self.management_url}/api/{path}",
            method=method,
            data=None if method in {"GET", "DELETE"} else json.dumps(body or {}).encode(),
            headers={"Authorization": f"Basic {credentials}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as response:
            answer = response.read()
        return json.loads(answer) if answer else None

    def answers(self) -> bool:
        """Whether the broker speaks AMQP: it accepts connections some time before it does."""
        parts = urlsplit(self.url)
        with socket.create_connection((parts.hostname or "localhost", parts.port or 5672), timeout=2) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(1) == b"\x01"  # a method frame: Connection.Start

    def management_answers(self) -> bool:
        try:
            self.manage("GET", "overview")
        except urllib.error.HTTPError as error:
            if error.code in {401, 403}:
                raise RuntimeError(f"{self.management_url} refuses the user of {self.source}") from error
            return False
        return True

    @property
    def _user(self) -> str:
        return unquote(urlsplit(self.url).username or "guest")

    @property
    def _password(self) -> str:
        return unquote(urlsplit(self.url).password or "guest")


class Postgres(Server):
    """A database server. Its `url` is SQLAlchemy's for asyncpg; a test gets a database of its own, without a schema."""

    @contextmanager
    def database(self) -> Iterator[str]:
        """The url of a new database, dropped afterwards with whatever is still connected to it."""
        name = f"test_{uuid4().hex[:12]}"
        self._execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            yield urlsplit(self.url)._replace(path=f"/{name}").geturl()
        finally:
            if self.running:
                self._execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def answers(self) -> bool:
        try:
            self._execute(sql.SQL("SELECT 1"))
        except psycopg.OperationalError:  # also "the database system is starting up"
            return False
        return True

    @property
    def dsn(self) -> str:
        """The url as psycopg and psql take it, without SQLAlchemy's driver."""
        return urlsplit(self.url)._replace(scheme="postgresql").geturl()

    def _execute(self, statement: sql.SQL | sql.Composed) -> None:
        with psycopg.connect(self.dsn, autocommit=True, connect_timeout=5) as connection:
            connection.execute(statement)
