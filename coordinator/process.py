"""What a process of ours sets up before it works: event loop, logging, tracing, signals."""

import asyncio
import faulthandler
import getpass
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any, NoReturn, TypeVar

from opentelemetry import trace
from opentelemetry.instrumentation.aio_pika import AioPikaInstrumentor
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from pythonjsonlogger.json import JsonFormatter

from coordinator.redaction import escaped
from events.clock import Clock
from events.database import is_transient
from events.errors import BusClosedError, ConfigurationError
from events.service import Supervisor

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 5.0
_REARM_EVERY = 5.0
TIDY_UP = 10.0  # seconds that a process gets to end when its handlers have had their time
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_JSON = "%(asctime)s %(levelname)s %(name)s %(message)s"


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on uvloop where it is installed (the extra `fast`), else on asyncio's own loop."""
    try:
        import uvloop  # noqa: PLC0415  # optional
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def log_to_stderr(level: str, style: str) -> None:
    """Send log records to standard error: as text, or as one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(_JSON) if style == "json" else _TextFormatter(_TEXT))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("aio_pika", "alembic", "httpx2", "httpcore2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)  # what it reports as an error, we report in our words


class _TextFormatter(logging.Formatter):
    """A line for each record, and its stack below, further in.

    What others have written, in a message or in an error, neither steers the terminal nor looks like another record.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the name is logging's
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802  # as above
        return self.formatStack(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802  # as above
        return "\n".join(f"  {escaped(line)}" for line in stack_info.splitlines())


@contextmanager
def traced(service: str) -> Iterator[None]:
    """Export spans over OTLP for the length of the block if an endpoint is set in the environment.

    The variables are OpenTelemetry's own: `OTEL_EXPORTER_OTLP_ENDPOINT`, `OTEL_EXPORTER_OTLP_PROTOCOL`
    (`grpc`, the default, or `http/protobuf`), `OTEL_SERVICE_NAME` and so on.

    Raises:
        ConfigurationError: an endpoint is set and the extra `otlp` is not installed.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        yield
        return
    resource = Resource.create({} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: service})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(_exporter()))
    trace.set_tracer_provider(provider)
    instrumentor = AioPikaInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        yield
    finally:
        instrumentor.uninstrument()
        provider.shutdown()


def _exporter() -> SpanExporter:
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    try:
        if protocol == "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

            return OTLPSpanExporter()
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter as GrpcSpanExporter,
        )

        return GrpcSpanExporter()
    except ImportError as error:
        raise ConfigurationError(
            "an OTLP endpoint is set, but the exporter is not installed: pip install 'saga-coordinator[otlp]'"
        ) from error


def login() -> str:
    """Return who runs this process.

    Raises:
        ConfigurationError: it has no name.
    """
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, say
        raise ConfigurationError("this user has no login name here; say who you are with --by") from None


async def enter_when_up(
    stack: AsyncExitStack, opening: Callable[[], AbstractAsyncContextManager[T]], *, patience: float, clock: Clock
) -> T:
    """Enter what `opening` returns; while a server is not up yet, try again for `patience` seconds.

    Programs and servers are often started together, and nobody wants to put them in order.

    Raises:
        Exception: what `opening` raises that waiting does not change, or that has not changed in time.
    """
    end = clock.monotonic() + patience
    pause = _FIRST_PAUSE
    while True:
        try:
            return await stack.enter_async_context(opening())
        except Exception as error:
            left = end - clock.monotonic()
            if not (isinstance(error, BusClosedError) or is_transient(error)) or left <= 0:
                raise
            logger.warning("waits for a server, %.0f s more: %s", left, error, extra={"action": "process.waits"})
        await clock.sleep(min(pause, left))
        pause = min(_LONGEST_PAUSE, pause * 2)


@asynccontextmanager
async def exits_when_stalled(limit: float, clock: Clock) -> AsyncIterator[None]:
    """End the process with exit code 1 if its event loop stands still for `limit` seconds during the block.

    Code that blocks for ever also blocks heartbeats, leases and the stop on SIGTERM: nothing in the process can help
    it, and whoever supervises it sees it alive. The stacks of all threads go to standard error first. 0 is never.
    """
    if not limit:
        yield
        return
    error_output = sys.stderr.fileno()  # the file object may be replaced meanwhile

    async def rearm() -> None:
        while True:
            # It counts in a thread that needs neither the loop nor the interpreter's lock.
            faulthandler.dump_traceback_later(limit, exit=True, file=error_output)
            await clock.sleep(min(_REARM_EVERY, limit / 4))

    supervisor = Supervisor(clock)  # without one, an error in `rearm` would end a process that lives
    supervisor.start("process.stall", rearm)
    try:
        yield
    finally:
        await supervisor.stop()
        faulthandler.cancel_dump_traceback_later()


@asynccontextmanager
async def exits_when_overdue(limit: float, clock: Clock, overdue: Callable[[], float]) -> AsyncIterator[None]:
    """End the process with exit code 1 once `overdue()` has reached `limit` during the block.

    A handler that goes on although it is cancelled keeps its slot, and a transaction perhaps, until its process ends.
    0 is never.
    """
    if not limit:
        yield
        return

    async def watch() -> None:
        while (seconds := overdue()) < limit:
            await clock.sleep(_REARM_EVERY)
        _leave(f"a handler has not ended {seconds:.0f} s after it was cancelled")

    supervisor = Supervisor(clock)
    supervisor.start("process.overdue", watch)
    try:
        yield
    finally:
        await supervisor.stop()


@contextmanager
def shutdown_within(seconds: float) -> Iterator[Callable[[], None]]:
    """End the process with exit code 1 if the block has not ended `seconds` after the function it is given was called.

    Whoever asks a process to stop must not wait for ever: not for a handler that swallows its cancellation, not for
    a server that has stopped to answer. What is not committed then is done again, as after a crash.
    """
    timer = threading.Timer(seconds, _leave, [f"the shutdown takes longer than {seconds:g} s"])
    timer.daemon = True
    try:
        yield timer.start
    finally:
        timer.cancel()


def _leave(why: str) -> NoReturn:
    logger.critical("%s: the process ends without more ado", why, extra={"action": "process.leaves"})
    faulthandler.dump_traceback()
    os._exit(1)


async def until_stopped(announce: Callable[[], None]) -> None:
    """Return when the process is asked to stop: SIGTERM or SIGINT. Whoever has heard what it announces may ask."""
    stopped = asyncio.Event()
    with when_stopped(stopped.set):
        announce()
        await stopped.wait()


@contextmanager
def when_stopped(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` when the process is asked to stop during the block: SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
