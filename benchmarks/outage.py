"""`python -m benchmarks.outage`: a third party is away for a minute under steady load; prints the curve."""

import argparse
import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx2
from dishka import Provider, Scope
from rich.console import Console
from rich.table import Column, Table
from sqlalchemy import func, select

from coordinator import App, process
from coordinator.node import Node
from coordinator.settings import Settings
from events import Command
from events.clock import SystemClock
from events.database import reader
from events.service import cancel_all
from events.tables import dead_letter
from handlers import Breaker, Context, Handler, Retry, handles
from handlers.catalog.resources import Http, ThirdPartyError
from handlers.tables import retry
from tests.support import servers

_clock = SystemClock()
_ANSWER = b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class Notify(Command):
    number: int


class Partner:
    """An HTTP server that can be stopped and started again at its address; it counts what it was asked."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, asking: asyncio.StreamReader, answering: asyncio.StreamWriter) -> None:
        self._writers.add(answering)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await asking.readuntil(b"\r\n\r\n")).decode().lower()
                size = head.partition("content-length: ")[2].partition("\r\n")[0]
                await asking.readexactly(int(size or 0))
                self.asked[head.partition("idempotency-key: ")[2].partition("\r\n")[0]] += 1
                answering.write(_ANSWER)
                await answering.drain()
        self._writers.discard(answering)
        answering.close()


@dataclass(frozen=True)
class Sample:
    """How things stand `at` seconds after the begin."""

    at: float
    sent: int
    handled: int
    tries: int
    waiting: int
    breaker: str


@dataclass(frozen=True)
class Outcome:
    """What the outage has done. `attempts` are the numbers of the tries that went well."""

    samples: Sequence[Sample]
    attempts: Sequence[int]
    asked: Counter[str]
    dead: int


def make_handler(breaker: Breaker, tries: list[int], attempts: list[int], url: Callable[[], str]) -> Handler:
    @handles(Notify, retry=Retry(attempts=10, quick=1, first=1, factor=2, most=10), breaker=breaker)
    async def notify(command: Notify, http: Http, context: Context) -> None:
        tries.append(command.number)
        status, _ = await http.call("the partner", "POST", url(), key=str(command.number), body={})
        if status != 201:
            raise http.unexpected("the partner", status)
        attempts.append(context.attempt)

    return notify


async def outage(
    broker_url: str, database_url: str, *, rate: float, before: float, away: float, patience: float, every: float = 1.0
) -> Outcome:
    """Send `rate` commands a second; the third party is away for `away` seconds; return when all are handled."""
    partner, tries, attempts = Partner(), list[int](), list[int]()
    await partner.start()
    breaker = Breaker("partner", minimum=5, window=10, open_for=1, most=4, on=(ThirdPartyError,))
    handler = make_handler(breaker, tries, attempts, lambda: partner.url)
    samples: list[Sample] = []
    sent = 0
    async with httpx2.AsyncClient(timeout=5) as client:
        resources = Provider(scope=Scope.APP)
        resources.provide(lambda: Http(client), provides=Http)
        app = App("outage", handlers=[handler], resources=[resources])
        settings = Settings(broker_url=broker_url, database_url=database_url)
        async with Node(app, settings) as node:
            begun = _clock.monotonic()

            async def load() -> None:
                nonlocal sent
                while _clock.monotonic() - begun < before + away + before:
                    await node.publisher.publish(Notify(number=sent))
                    sent += 1
                    await _clock.sleep(max(0, begun + sent / rate - _clock.monotonic()))

            async def watch() -> None:
                while True:
                    async with reader(node.engine).connect() as connection:
                        waiting = await connection.scalar(select(func.count()).select_from(retry))
                    phase = node.handler_states()[handler.name]["phase"]
                    at = _clock.monotonic() - begun
                    samples.append(Sample(at, sent, len(partner.asked), len(tries), waiting or 0, phase))
                    await _clock.sleep(every)

            async def fail() -> None:
                await _clock.sleep(before)
                await partner.stop()
                await _clock.sleep(away)
                await partner.start()

            tasks = [asyncio.create_task(each()) for each in (load, fail)]
            watching = asyncio.create_task(watch())
            try:
                await asyncio.gather(*tasks)
                async with asyncio.timeout(patience):
                    while len(attempts) < sent:
                        await _clock.sleep(0.1)
                await _clock.sleep(every)
            finally:
                await cancel_all([*tasks, watching])
            async with reader(node.engine).connect() as connection:
                dead = await connection.scalar(select(func.count()).select_from(dead_letter))
    await partner.stop()
    return Outcome(samples, attempts, partner.asked, dead or 0)


def show(console: Console, outcome: Outcome) -> None:
    """Print the curve: one line every few seconds."""
    columns = [Column(name, justify="right") for name in ("second", "sent", "handled", "backlog", "waiting", "tries")]
    table = Table(*columns, "breaker", title="a third party is away")
    last = 0
    for sample in outcome.samples[:: max(1, len(outcome.samples) // 40)]:
        numbers = (sample.at, sample.sent, sample.handled, sample.sent - sample.handled, sample.waiting)
        table.add_row(*(f"{number:.0f}" for number in numbers), f"+{sample.tries - last}", sample.breaker)
        last = sample.tries
    console.print(table)
    spread = ", ".join(
        f"{number} at attempt {attempt}" for attempt, number in sorted(Counter(outcome.attempts).items())
    )
    console.print(f"handled: {spread}; dead letters: {outcome.dead}; asked twice: {_repeats(outcome)}")


def _repeats(outcome: Outcome) -> int:
    return sum(times - 1 for times in outcome.asked.values())


def main() -> None:
    """Measure; servers come from TEST_AMQP_URL and TEST_PG_URL, Docker, or this machine's programs."""
    parser = argparse.ArgumentParser(prog="benchmarks.outage", description=main.__doc__)
    parser.add_argument("--rate", type=float, default=50, help="commands a second (default 50)")
    parser.add_argument("--before", type=float, default=10, help="seconds before the outage and after it (default 10)")
    parser.add_argument("--away", type=float, default=60, help="seconds of the outage (default 60)")
    options = parser.parse_args()
    process.log_to_stderr("ERROR", "text")
    with servers.provided() as given:
        outcome = process.run(
            outage(
                given.amqp_url,
                given.pg_url,
                rate=options.rate,
                before=options.before,
                away=options.away,
                patience=120,
            )
        )
    show(Console(), outcome)


if __name__ == "__main__":
    main()
