"""Whether a process lives and is ready, over HTTP: for whoever starts it again, or sends work elsewhere.

`/live` answers as long as the event loop runs, `/ready` with 200 or 503 and the reasons. Nothing else is served and
nothing is read but the first line of a request, so it needs no web framework.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from pydantic_core import to_json

from coordinator.node import Node
from events.errors import ConfigurationError

_PATIENCE = 5.0
_MAX_LINE = 2048


@asynccontextmanager
async def serving_health(node: Node, address: str) -> AsyncIterator[None]:
    """Answer on `address` (host:port) for the length of the block; with an empty one do nothing.

    Raises:
        ConfigurationError: nobody can listen there.
    """
    if not address:
        yield
        return
    host, _, port = address.rpartition(":")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                line = await reader.readuntil(b"\r\n")
                status, body = await _look(node, line.split(b" ")[1:2])
                writer.write(_response(status, body))
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked has gone, or speaks no HTTP
        finally:
            writer.close()

    try:
        server = await asyncio.start_server(answer, host.strip("[]") or None, int(port), limit=_MAX_LINE)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"COORDINATOR_HEALTH: cannot listen on {address}: {error}") from error
    async with server:
        yield


async def _look(node: Node, path: list[bytes]) -> tuple[HTTPStatus, bytes]:
    match path:
        case [b"/live"]:
            return HTTPStatus.OK, b'{"live":true}'
        case [b"/ready"]:
            problems = await node.problems()
            document = {"ready": not problems, "problems": problems, "handlers": node.handler_states()}
            return HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK, to_json(document)
        case _:
            return HTTPStatus.NOT_FOUND, b'{"paths":["/live","/ready"]}'


def _response(status: HTTPStatus, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\nConnection: close\r\n\r\n" + body
