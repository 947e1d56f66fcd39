"""Servers for the tests. Nothing is skipped silently: the summary names what could not run, and CI fails for it."""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import pytest
from xdist.workermanage import WorkerController  # type: ignore[import-untyped]  # ships no types

from tests.support import servers
from tests.support.counts import note, noted
from tests.support.otlp import OtlpSink
from tests.support.servers import MissingServerError, Postgres, RabbitMQ, Server

MISSING = "no server: "
SOURCES: pytest.StashKey[list[str]] = pytest.StashKey()

# Tests get the marker of the servers they ask for; a test that asks at run time sets it itself.
MARKERS = {
    "rabbitmq": {"rabbitmq", "amqp_url", "private_rabbitmq", "private_amqp_url"},
    "postgres": {"postgres", "pg_url", "private_postgres", "private_pg_url"},
}

# How long RabbitMQ waits, in milliseconds by default.
TIMES = {"consumer_timeout": 1_800_000, "channel_tick_interval": 60_000}
TIMES |= {"dead_letter_worker_publisher_confirm_timeout": 180_000}

ServerT = TypeVar("ServerT", bound=Server)


@pytest.fixture(scope="session")
def rabbitmq(pytestconfig: pytest.Config) -> Iterator[RabbitMQ]:
    """The broker that all tests share; not to be stopped."""
    with _prepared(pytestconfig, servers.rabbitmq) as server:
        server.start()
        yield server


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Iterator[Postgres]:
    """The database server that all tests share, without fsync; not to be stopped."""
    with _prepared(pytestconfig, partial(servers.postgres, durable=False)) as server:
        server.start()
        yield server


@pytest.fixture
def amqp_url(rabbitmq: RabbitMQ) -> Iterator[str]:
    """A fresh virtual host."""
    with rabbitmq.vhost() as url:
        yield url


@pytest.fixture
def namespace() -> str:
    """A name that no other test has: keeps tests apart even where a given broker lets them share a virtual host."""
    return f"t{uuid4().hex[:8]}"


@pytest.fixture
def pg_url(postgres: Postgres) -> Iterator[str]:
    """A fresh database, without a schema, as postgresql+asyncpg://..."""
    with postgres.database() as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A database file that is not there yet."""
    return f"sqlite+aiosqlite:///{tmp_path / 'test.db'}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """Runs the test once on each database; the schema is the test's to make."""
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "pg_url")
    return url


@pytest.fixture(scope="module")
def _module_rabbitmq(pytestconfig: pytest.Config) -> Iterator[RabbitMQ]:
    with _prepared(pytestconfig, partial(servers.rabbitmq, private=True)) as server:
        yield server


@pytest.fixture(scope="module")
def _module_postgres(pytestconfig: pytest.Config) -> Iterator[Postgres]:
    with _prepared(pytestconfig, partial(servers.postgres, private=True, durable=True)) as server:
        yield server


@pytest.fixture
def private_rabbitmq(_module_rabbitmq: RabbitMQ) -> RabbitMQ:
    """The module's own broker, for tests that stop and kill it. Runs again for each test, with its data."""
    _module_rabbitmq.start()
    return _module_rabbitmq


@pytest.fixture
def private_postgres(_module_postgres: Postgres) -> Postgres:
    """The module's own database server with fsync, for tests that stop and kill it. Runs again for each test."""
    _module_postgres.start()
    return _module_postgres


@pytest.fixture
def private_amqp_url(private_rabbitmq: RabbitMQ) -> Iterator[str]:
    """A fresh virtual host of the module's own broker."""
    with private_rabbitmq.vhost() as url:
        yield url


@pytest.fixture
def impatient_rabbitmq(private_rabbitmq: RabbitMQ) -> Iterator[RabbitMQ]:
    """A broker that waits for acknowledgements for a second, and for a dead letter's confirm as well."""
    private_rabbitmq.control("eval", ", ".join(f"application:set_env(rabbit, {name}, 1000)" for name in TIMES) + ".")
    yield private_rabbitmq
    restore = ", ".join(f"application:set_env(rabbit, {name}, {time})" for name, time in TIMES.items())
    private_rabbitmq.control("eval", f"{restore}.")


@pytest.fixture
def private_pg_url(private_postgres: Postgres) -> Iterator[str]:
    """A fresh database of the module's own server."""
    with private_postgres.database() as url:
        yield url


@pytest.fixture
def otlp() -> Iterator[OtlpSink]:
    """A collector for traces."""
    with OtlpSink() as sink:
        yield sink


@contextmanager
def _prepared(config: pytest.Config, make: Callable[[], ServerT]) -> Iterator[ServerT]:
    """A server, ended in any case; or the skip that the summary knows."""
    try:
        server = make()
    except MissingServerError as error:
        pytest.skip(f"{MISSING}{error}")
    with closing(server):
        yield server
        _note(config, server)


def _note(config: pytest.Config, server: Server) -> None:
    kind = "RabbitMQ" if isinstance(server, RabbitMQ) else "PostgreSQL"
    _add_source(config, f"{kind}: {server.source}")


def _add_source(config: pytest.Config, line: str) -> None:
    sources = config.stash.setdefault(SOURCES, [])
    if line not in sources:
        sources.append(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        for marker, wanting in MARKERS.items():
            if fixtures & wanting:
                item.add_marker(marker)


def pytest_sessionfinish(session: pytest.Session) -> None:
    to_tell = getattr(session.config, "workeroutput", None)
    if to_tell is not None:  # several processes run tests, and this is not the one that reports
        to_tell["sources"] = session.config.stash.get(SOURCES, [])
        to_tell["counts"] = noted(session.config)
    if _not_run(session.config) and os.environ.get("CI", "").lower() == "true":
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, object, object]:
    """Let a report be sent that quotes what is no Unicode: some tests log a lone surrogate."""
    return _sendable((yield))


def _sendable(value: object) -> object:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _sendable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_sendable(each) for each in value)
    return value


def pytest_testnodedown(node: WorkerController) -> None:
    said = getattr(node, "workeroutput", {})  # one that has crashed says nothing
    for line in said.get("sources", []):
        _add_source(node.config, line)
    for line in said.get("counts", []):
        note(node.config, line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    sources = config.stash.get(SOURCES, [])
    if sources:
        terminalreporter.section("servers")
        for line in sources:
            terminalreporter.write_line(line)
    if lines := noted(config):
        terminalreporter.section("counts")
        for line in lines:
            terminalreporter.write_line(line)
    not_run = _not_run(config)
    if not_run:
        terminalreporter.section("NOT RUN, for want of a server", red=True, bold=True)
        for test, reason in not_run:
            terminalreporter.write_line(f"{test}: {reason}")


def _not_run(config: pytest.Config) -> list[tuple[str, str]]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports: list[pytest.TestReport] = reporter.stats.get("skipped", []) if reporter else []
    reasons = [(report.nodeid, report.longrepr[2]) for report in reports if isinstance(report.longrepr, tuple)]
    return [(test, reason.split(MISSING, 1)[1]) for test, reason in reasons if MISSING in reason]
