"""Servers from Docker, through testcontainers.

Their ports are fixed, as Docker would publish others after a restart, and their addresses have to last over one.
"""

import gc
import os
import threading
import warnings
from abc import abstractmethod
from collections.abc import Iterable
from functools import cache

from docker.errors import DockerException, ImageNotFound  # type: ignore[import-untyped]  # docker ships no types
from docker.types import Ulimit  # type: ignore[import-untyped]  # as above
from testcontainers.community.postgres import PostgresContainer
from testcontainers.community.rabbitmq import RabbitMqContainer
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient

from tests.support.base import MissingServerError, Postgres, RabbitMQ, Server, free_port, wait_until

PULL_SECONDS = 60

# What scripts/containers.sh builds where nothing can be pulled.
LOCAL_RABBITMQ_IMAGE = "local/rabbitmq"
LOCAL_POSTGRES_IMAGE = "local/postgres"

# Erlang sizes its tables by this limit, and a daemon without one costs gigabytes. Asking for more than the daemon has
# itself would fail; this is enough for a test.
OPEN_FILES = Ulimit(name="nofile", soft=8192, hard=8192)


def docker_client() -> DockerClient:
    client = _connect()
    if client is None:
        raise MissingServerError("no Docker daemon answers")
    return client


@cache
def _connect() -> DockerClient | None:
    try:
        return DockerClient(timeout=PULL_SECONDS)
    except DockerException:
        pass
    # docker forgets to close its socket when nobody answers. The warning would come up in some test later on.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    return None


@cache
def has_image(name: str) -> bool:
    try:
        docker_client().client.images.get(testcontainers_config.hub_image_name_prefix + name)
    except ImageNotFound:
        return False
    return True


@cache
def can_pull(name: str) -> bool:
    """Pulls an image, for a minute at most: behind some firewalls the daemon would try for much longer."""

    def pull() -> None:
        try:
            docker_client().client.images.pull(testcontainers_config.hub_image_name_prefix + name)
        except DockerException:
            return
        pulled.set()

    pulled = threading.Event()
    thread = threading.Thread(target=pull, name=f"pull {name}", daemon=True)
    thread.start()
    thread.join(PULL_SECONDS)
    if pulled.is_set():
        has_image.cache_clear()
    return pulled.is_set()


def find_image(variable: str, default: str, local: str) -> str:
    """The image to use: what the variable says, or the default, or the one built here; pulled as a last resort."""
    wanted = os.environ.get(variable)
    candidates = [wanted] if wanted else [default, f"{local}:latest"]
    docker_client()
    for name in candidates:
        if has_image(name):
            return name
    if can_pull(candidates[0]):
        return candidates[0]
    raise MissingServerError(f"the image {candidates[0]} is not there and cannot be pulled ({variable} names another)")


def _prepare() -> None:
    """Goes without testcontainers' own cleaner, which is an image too, where that cannot be had."""
    ryuk = testcontainers_config.ryuk_image
    if not testcontainers_config.ryuk_disabled and not has_image(ryuk) and not can_pull(ryuk):
        testcontainers_config.ryuk_disabled = True


class _Container(Server):
    """start, stop and kill -9 of one container, which keeps its data until it is removed."""

    def __init__(self, container: DockerContainer, *, ports: Iterable[int], hostname: str) -> None:
        self.source = f"container {container.image}"
        # RabbitMQ finds its data by its host name. with_kwargs replaces what an earlier call set: one call for all.
        self._container = container.with_kwargs(ulimits=[OPEN_FILES], hostname=hostname)
        self._addresses = dict.fromkeys(ports, "")
        for port in self._addresses:
            container.with_bind_ports(port, free_port())
        self._created = False
        self._running = False

    @property
    def running(self) -> bool:
        return self._running

    def start(self) -> None:
        if self._running:
            return
        if self._created:
            self._container.get_wrapped_container().start()
        else:
            _prepare()
            self._created = True
            self._container.start()
            self._addresses = {port: self._address(port) for port in self._addresses}
        self._running = True
        wait_until(self._ready, self.source)

    def stop(self) -> None:
        if self._running:
            self._container.get_wrapped_container().stop(timeout=30)
            self._running = False

    def kill9(self) -> None:
        if self._running:
            self._container.get_wrapped_container().kill("SIGKILL")
            self._container.wait()
            self._running = False

    def close(self) -> None:
        if self._created:
            self._container.stop()
            self._running = False

    @abstractmethod
    def _ready(self) -> bool: ...

    def _address(self, port: int) -> str:
        host = self._container.get_container_host_ip()
        # By number: the name would be tried with IPv6 first, where Docker may not listen.
        return f"{'127.0.0.1' if host == 'localhost' else host}:{self._container.get_exposed_port(port)}"


class ContainerRabbitMQ(_Container, RabbitMQ):
    """RabbitMQ with its management plugin, from an image."""

    def __init__(self) -> None:
        image = find_image("TEST_RABBITMQ_IMAGE", "rabbitmq:4-management", LOCAL_RABBITMQ_IMAGE)
        # Everything by argument: what is missing, testcontainers takes from this process's environment.
        container = RabbitMqContainer(image, port=5672, username="guest", password="guest", vhost="/")
        super().__init__(container, ports=[5672, 15672], hostname="rabbitmq")

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{self._addresses[5672]}/"

    @property
    def management_url(self) -> str:
        return f"http://{self._addresses[15672]}"

    def control(self, *arguments: str) -> None:
        result = self._container.exec(["rabbitmqctl", *arguments])
        if result.exit_code != 0:
            raise RuntimeError(result.output.decode(errors="replace"))

    def pause(self) -> None:
        self._container.get_wrapped_container().pause()

    def resume(self) -> None:
        self._container.get_wrapped_container().unpause()

    def _ready(self) -> bool:
        return self.answers() and self.management_answers()


class ContainerPostgres(_Container, Postgres):
    """PostgreSQL from an image."""

    def __init__(self, *, durable: bool = True) -> None:
        image = find_image("TEST_POSTGRES_IMAGE", "postgres:17", LOCAL_POSTGRES_IMAGE)
        container = PostgresContainer(image, username="test", password="test", dbname="test", driver=None)
        container.with_command(f"postgres -c fsync={'on' if durable else 'off'} -c max_connections=200")
        super().__init__(container, ports=[5432], hostname="postgres")

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://test:test@{self._addresses[5432]}/test"

    def _ready(self) -> bool:
        return self.answers()
