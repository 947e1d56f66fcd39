"""Where the tests' servers come from: a given address, Docker, or programs installed on this machine.

The first that works is taken. TEST_SERVERS forces one (auto, url, containers, local).

    python -m tests.support.servers install

installs what is missing where that is possible, and says what to install where it is not.
"""

import os
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from tests.support.base import MissingServerError, Postgres, RabbitMQ, Server
from tests.support.local import LocalPostgres, LocalRabbitMQ

__all__ = ["MissingServerError", "Postgres", "Provided", "RabbitMQ", "Server", "postgres", "provided", "rabbitmq"]

SERVERS = "TEST_SERVERS"
AMQP_URL = "TEST_AMQP_URL"
MANAGEMENT_URL = "TEST_AMQP_MANAGEMENT_URL"
PG_URL = "TEST_PG_URL"

APT_INSTALL = Path(__file__).parents[2] / "scripts" / "apt-install.sh"
DEBIAN_PACKAGES = {"RabbitMQ": "rabbitmq-server", "PostgreSQL": "postgresql"}

ServerT = TypeVar("ServerT", bound=Server)


class _Given(Server):
    """A server that somebody else runs: it is used, and neither started nor ended."""

    def __init__(self, variable: str) -> None:
        if not os.environ.get(variable):
            raise MissingServerError(f"{variable} is not set")
        self.source = variable
        self._url = os.environ[variable]

    @property
    def url(self) -> str:
        return self._url

    @property
    def running(self) -> bool:
        return True

    def start(self) -> None:
        """The server has to be there; a wrong address is an error and not a reason to try elsewhere."""
        if not self._reachable():
            raise RuntimeError(f"no server answers at {self.source}")

    def stop(self) -> None:
        raise RuntimeError(f"the server at {self.source} is not ours to stop")

    def kill9(self) -> None:
        raise RuntimeError(f"the server at {self.source} is not ours to kill")

    def close(self) -> None:
        """Leaves it running."""

    @abstractmethod
    def _reachable(self) -> bool: ...


class GivenRabbitMQ(_Given, RabbitMQ):
    def __init__(self) -> None:
        super().__init__(AMQP_URL)
        self._management_url: str | None = None

    @property
    def management_url(self) -> str | None:
        return self._management_url

    def start(self) -> None:
        super().start()
        default = f"http://{urlsplit(self.url).hostname}:15672"
        self._management_url = os.environ.get(MANAGEMENT_URL, default)
        with suppress(OSError):
            if self.management_answers():
                return
        self._management_url = None
        self.source += " (no management API: all tests share its virtual host)"

    def control(self, *arguments: str) -> None:
        raise RuntimeError(f"the server at {self.source} cannot be controlled from here: {' '.join(arguments)}")

    def pause(self) -> None:
        raise RuntimeError(f"the server at {self.source} is not ours to pause")

    def resume(self) -> None:
        raise RuntimeError(f"the server at {self.source} is not ours to resume")

    def _reachable(self) -> bool:
        with suppress(OSError):
            return self.answers()
        return False


class GivenPostgres(_Given, Postgres):
    def __init__(self) -> None:
        super().__init__(PG_URL)

    @property
    def url(self) -> str:
        return urlsplit(self._url)._replace(scheme="postgresql+asyncpg").geturl()

    def _reachable(self) -> bool:
        return self.answers()


def rabbitmq(*, private: bool = False) -> RabbitMQ:
    """A broker, not started yet; a private one may be stopped and killed.

    Raises:
        MissingServerError: None of the sources has one.
    """
    return _first(
        "RabbitMQ", private, {"url": GivenRabbitMQ, "containers": _container_rabbitmq, "local": LocalRabbitMQ}
    )


def postgres(*, private: bool = False, durable: bool = True) -> Postgres:
    """A database server, not started yet; without `durable` it is quicker, and loses data with the machine's power.

    Raises:
        MissingServerError: None of the sources has one.
    """
    sources: dict[str, Callable[[], Postgres]] = {
        "url": GivenPostgres,
        "containers": lambda: _container_postgres(durable=durable),
        "local": lambda: LocalPostgres(durable=durable),
    }
    return _first("PostgreSQL", private, sources)


@dataclass(frozen=True)
class Provided:
    """Servers for a program that is not a test."""

    amqp_url: str
    pg_url: str
    sources: Mapping[str, str]


@contextmanager
def provided() -> Iterator[Provided]:
    """A fresh virtual host and a fresh database (fsync on, no schema yet), gone at the end of the block.

    Raises:
        MissingServerError: A server cannot be had; the text says what would help.
    """
    with ExitStack() as stack:
        broker = stack.enter_context(closing(rabbitmq()))
        database = stack.enter_context(closing(postgres()))
        broker.start()
        database.start()
        yield Provided(
            amqp_url=stack.enter_context(broker.vhost()),
            pg_url=stack.enter_context(database.database()),
            sources={"RabbitMQ": broker.source, "PostgreSQL": database.source},
        )


def _first(kind: str, private: bool, sources: Mapping[str, Callable[[], ServerT]]) -> ServerT:
    missing = []
    for name in _order(private):
        try:
            return sources[name]()
        except MissingServerError as error:
            missing.append(str(error))
    raise MissingServerError(f"{kind}: {'; '.join(missing)}")


def _order(private: bool) -> tuple[str, ...]:
    wanted = os.environ.get(SERVERS, "auto")
    if wanted not in {"auto", "url", "containers", "local"}:
        raise ValueError(f"{SERVERS}={wanted}: expected auto, url, containers or local")
    if private:
        # A given server is not ours to kill, and a program comes back in half the time of a container.
        return ("containers",) if wanted == "containers" else ("local", "containers")
    return ("url", "containers", "local") if wanted == "auto" else (wanted,)


def _container_rabbitmq() -> RabbitMQ:
    from tests.support.containers import ContainerRabbitMQ  # noqa: PLC0415  # slow to import; unit tests do without

    return ContainerRabbitMQ()


def _container_postgres(*, durable: bool) -> Postgres:
    from tests.support.containers import ContainerPostgres  # noqa: PLC0415  # as above

    return ContainerPostgres(durable=durable)


def install() -> None:
    """Makes sure that there is a source for each kind of server, by installing packages where that is allowed."""
    packages = []
    makers: dict[str, Callable[[], Server]] = {"RabbitMQ": rabbitmq, "PostgreSQL": postgres}
    for kind, make in makers.items():
        try:
            make().close()
        except MissingServerError as error:
            sys.stderr.write(f"{error}\n")
            packages.append(DEBIAN_PACKAGES[kind])
    if packages and os.environ.get(SERVERS, "auto") in {"auto", "local"}:
        # Not checked: without the servers the tests still run, and their summary names what did not.
        subprocess.run([str(APT_INSTALL), *packages], check=False)


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit(__doc__)
    install()
