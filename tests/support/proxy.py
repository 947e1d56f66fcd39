"""A network between a client and a broker or a database that fails as it is told to."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import StrEnum

from yarl import URL


class Way(StrEnum):
    """One of the two directions of a connection."""

    TO_BROKER = "to the broker"
    TO_CLIENT = "to the client"


Watch = Callable[[Way, bytes], None]
"""Is shown what is about to be passed on."""


class Proxy:
    """Stands before a broker and passes bytes on, holds them back, or loses them.

    `hold` is a broker that hangs, or a network that drops packets until it is repaired. `swallow` is a connection
    that is gone for good in one direction, as behind a firewall that has forgotten it; later connections work.
    `watch_answers` asks before each answer. `cut` ends the connections there are now, at once or after so many bytes
    more.

    Args:
        target: the server.
        watch: called for each connection; what it returns sees all bytes before they are passed on.
    """

    def __init__(self, target: URL, watch: Callable[[], Watch] | None = None) -> None:
        self._target = target
        self._watch = watch
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._connections: dict[asyncio.Task[None], set[Way]] = {}
        self._left: dict[Way, int] = {}
        self._answers: asyncio.Queue[asyncio.Event] | None = None

    def hold(self) -> None:
        """Keep all bytes until `release`."""
        self._flowing.clear()

    def release(self) -> None:
        """Pass on what was held."""
        self._flowing.set()

    def swallow(self, way: Way) -> None:
        """Lose all that goes this way on the connections there are now; nobody is told."""
        for lost in self._connections.values():
            lost.add(way)

    def watch_answers(self) -> asyncio.Queue[asyncio.Event]:
        """Let each answer pass only when its event is set, until the connections are cut."""
        self._answers = asyncio.Queue()
        return self._answers

    def cut(self) -> None:
        """End all connections there are now."""
        self._answers = None
        for connection in list(self._connections):
            connection.cancel()

    def cut_after(self, count: int, way: Way) -> None:
        """Pass on `count` bytes more this way, over all connections, then end them."""
        self._left[way] = count

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """The URL of the broker behind this proxy."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            yield str(self._target.with_host("127.0.0.1").with_port(port))
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lost: set[Way] = set()
        task = asyncio.create_task(self._serve(reader, writer, lost))
        self._connections[task] = lost
        task.add_done_callback(self._connections.pop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: set[Way]) -> None:
        from_broker, to_broker = await asyncio.open_connection(self._target.host, self._target.port)
        watch = self._watch() if self._watch else None
        await asyncio.gather(
            self._pass_on(reader, to_broker, Way.TO_BROKER, lost, watch),
            self._pass_on(from_broker, writer, Way.TO_CLIENT, lost, watch),
        )

    def _count(self, way: Way, passed: int) -> None:
        self._left[way] -= passed
        if self._left[way] == 0:
            del self._left[way]
            self.cut()

    async def _pass_on(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        way: Way,
        lost: set[Way],
        watch: Watch | None,
    ) -> None:
        try:
            while data := await source.read(65_536):
                await self._flowing.wait()
                if way is Way.TO_CLIENT and self._answers is not None:
                    may_pass = asyncio.Event()
                    self._answers.put_nowait(may_pass)
                    await may_pass.wait()
                passed = data[: self._left.get(way)]
                if watch:
                    watch(way, passed)
                if way not in lost:
                    sink.write(passed)
                    await sink.drain()
                if way in self._left:
                    self._count(way, len(passed))
        except ConnectionError:
            pass
        finally:
            sink.close()
