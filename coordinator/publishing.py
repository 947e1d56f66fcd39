"""Publishing a file of CloudEvents, one JSON object a line."""

import json
import sys
from collections.abc import Iterable, Iterator

from rich.console import Console

from coordinator.app import App
from events import tracing
from events.bus import Address, Bus, Exchange, Outgoing
from events.codec import STRUCTURED_TYPE, Limits, Readable, bundle_body, read_body
from events.envelope import Envelope
from events.errors import PublishError, RejectedError
from events.outbox import Outbound, route
from events.registry import Registry

_BATCH = 256


async def publish_lines(
    lines: Iterable[bytes], bus: Bus, app: App | None, limits: Limits, console: Console, *, as_json: bool
) -> bool:
    """Publish every line that is an event, confirmed by the bus; return whether all were.

    With an `app`, each event must be one that the application can read; its queues must have been declared, so that
    nothing is published before somebody receives it.
    """
    registry = app.registry if app else None
    published, problems = 0, 0
    for batch in _batches(lines):
        outgoing: list[tuple[int, Outgoing]] = []
        for number, line in batch:
            try:
                outgoing.append((number, _prepare(line, registry, limits)))
            except RejectedError as error:
                problems += 1
                _complain(number, error)
        errors: list[PublishError | None] = list(await bus.publish([message for _, message in outgoing]))
        for (number, _), failure in zip(outgoing, errors, strict=True):
            if failure is None:
                published += 1
            else:
                problems += 1
                _complain(number, failure)
    if as_json:
        console.print_json(json.dumps({"published": published, "problems": problems}))
    else:
        console.print(f"{published} published, {problems} not", highlight=False)
    return problems == 0


def _batches(lines: Iterable[bytes]) -> Iterator[list[tuple[int, bytes]]]:
    batch: list[tuple[int, bytes]] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            batch.append((number, line.strip()))
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _prepare(line: bytes, registry: Registry | None, limits: Limits) -> Outgoing:
    part = read_body(line, content_type=STRUCTURED_TYPE, headers={}, encoding=None, limits=limits)[0]
    if not isinstance(part, Readable):
        raise part.error
    envelope = part.envelope
    if envelope.traceparent is None:  # the trace of whatever follows begins here
        with tracing.created(envelope.type) as context:
            envelope.traceparent, envelope.tracestate = context.traceparent, context.tracestate
    outbound = Outbound(envelope, _address(envelope, registry))
    body = bundle_body([outbound.encode(limits)])
    return Outgoing(outbound.address, body, traceparent=envelope.traceparent, tracestate=envelope.tracestate)


def _address(envelope: Envelope, registry: Registry | None) -> Address:
    if registry is None:
        return Address(Exchange.EVENTS, envelope.type)
    return route(registry.read(envelope))


def _complain(number: int, error: Exception) -> None:
    print(f"line {number}: {error}", file=sys.stderr)  # noqa: T201  # this is the command line
