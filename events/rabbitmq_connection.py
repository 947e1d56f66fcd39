"""Where RabbitMQ is, and connections to it."""

import logging
from collections.abc import Callable

from aio_pika import RobustConnection
from aio_pika.abc import AbstractChannel
from aio_pika.exceptions import AuthenticationError, ConnectionClosed, InvalidFrameError, ProbableAuthenticationError
from yarl import URL

from events.errors import BusClosedError, ConfigurationError
from events.rabbitmq_topology import close_quietly

_log = logging.getLogger(__name__)
_HEARTBEAT = "10"
_PORTS = {"amqp": 5672, "amqps": 5671}


class Broker:
    """A broker, by its URL.

    Args:
        url: `amqp://user:password@host:5672/vhost`, or `amqps://` for TLS.
        read_url: returns the URL as it is now, if it may change.
        client_name: what connections are called, with their purpose behind it.
        timeout: seconds for connecting.

    Raises:
        ConfigurationError: the URL cannot be read.
    """

    def __init__(self, url: str, *, read_url: Callable[[], str] | None, client_name: str, timeout: float) -> None:
        self._url = _parse(url)
        self._read_url = read_url
        self._client_name = client_name
        self._timeout = timeout

    @property
    def place(self) -> str:
        """Host and port, for messages."""
        return f"{self._url.host}:{self._url.port}"

    def url_to(self, purpose: str) -> URL:
        """Return the URL of a connection for a purpose."""
        name = f"{self._client_name} {purpose}"
        return self._url.with_query({"heartbeat": _HEARTBEAT, **self._url.query, "name": name})

    def renew(self, *connections: tuple[RobustConnection | None, str]) -> None:
        """Let connections that are lost, each with its purpose, go on with the URL that is right by now."""
        if self._read_url is None:
            return
        try:
            self._url = _parse(self._read_url())
        except ConfigurationError as error:
            _log.error("the broker URL is not renewed: %s", error, extra={"action": "bus.url_not_renewed"})
            return
        for connection, purpose in connections:
            if connection is not None and not is_up(connection):
                connection.url = self.url_to(purpose)

    async def connect(self, purpose: str) -> RobustConnection:
        """Connect once; the connection comes back by itself from then on.

        Raises:
            BusClosedError: there is no broker.
            ConfigurationError: the broker refuses the user, or the virtual host.
            TimeoutError: it does not answer.
        """
        connection = RobustConnection(self.url_to(purpose), reconnect_interval=1)
        try:
            await connection.connect(timeout=self._timeout)
        except BaseException as error:
            await close_quietly(connection.close(), within=1)
            match error:
                case AuthenticationError() | ProbableAuthenticationError():
                    raise ConfigurationError(
                        f"RabbitMQ at {self.place} refuses the user or the password of the broker URL"
                    ) from error
                case ConnectionClosed() | InvalidFrameError():
                    vhost = self._url.path.removeprefix("/") or "/"
                    raise ConfigurationError(
                        f"RabbitMQ at {self.place} does not open vhost {vhost} for the user of the broker URL"
                    ) from error
                case OSError() if not isinstance(error, TimeoutError):
                    raise BusClosedError(
                        f"RabbitMQ at {self.place} cannot be reached ({error}); start it or correct the broker URL"
                    ) from error
            raise
        return connection


def is_up(connection: RobustConnection | None) -> bool:
    """Whether a connection can be used now."""
    return connection is not None and not connection.is_closed and connection.connected.is_set()


def is_blocked(connection: RobustConnection | None) -> bool:
    """Whether RabbitMQ has said on this connection that it reads no more publishes.

    aiormq keeps that to itself, but its public `ready()` waits for the end of it. So one step of `ready()` tells.
    """
    if connection is None or connection.transport is None or not is_up(connection):
        return False
    step = connection.transport.connection.ready()
    try:
        step.send(None)
    except StopIteration:
        return False
    finally:
        step.close()
    return True


def is_closed(channel: AbstractChannel | None) -> bool:
    """Whether a channel must be replaced."""
    return channel is None or channel.is_closed


def _parse(text: str) -> URL:
    try:
        url = URL(text)
        readable = url.scheme in _PORTS and bool(url.host)
        port = url.explicit_port
    except ValueError:
        readable, port, url = False, None, URL()
    if not readable:
        # Without the cause: the text of a parse error can hold the password.
        raise ConfigurationError("the broker URL cannot be read; write amqp://user:password@host:5672/vhost")
    return url if port else url.with_port(_PORTS[url.scheme])
