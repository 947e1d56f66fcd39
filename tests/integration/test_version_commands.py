"""The commands about versions, as a person reads them."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from typer.testing import CliRunner, Result

from coordinator import Settings
from coordinator.cli import cli
from coordinator.node import Node
from events.ids import TimeOrderedIds
from tests.support.flows import until
from tests.support.ledger_app import OrderPlaced
from tests.support.upgrade_app import first

APP = "tests.support.upgrade_app"
Run = Callable[..., Result]


async def place(settings: Settings, orders: dict[UUID, int]) -> None:
    """Leave orders in flight whose first step nobody does."""
    async with Node(first, settings, handlers=False) as node:
        for order, number in orders.items():
            await node.publisher.publish(OrderPlaced(order_id=order, number=number))

        async def all_are_there() -> bool:
            return len(await node.store.list()) == len(orders)

        await until(all_are_there)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command on a database with two orders, of which number 3 is not to be taken over."""
    url = f"sqlite:///{tmp_path / 'coordinator.db'}"
    monkeypatch.setenv("COORDINATOR_DATABASE_URL", url)
    monkeypatch.setenv("COLUMNS", "200")
    ids = TimeOrderedIds()
    asyncio.run(place(Settings(database_url=url), {ids.new(): 1, ids.new(): 3}))
    return lambda *arguments: CliRunner().invoke(cli, ["sagas", *arguments])


def test_versions_are_listed_with_what_the_code_does_with_them(run: Run) -> None:
    assert "in flight" in run("versions").stdout
    shown = run("versions", "--app", f"{APP}:second").stdout
    assert "finishes" in shown
    assert "starts new ones" in run("versions", "--app", f"{APP}:first").stdout
    assert "missing" in run("versions", "--app", "tests.support.poison_app:app").stdout


def test_a_version_with_instances_in_flight_is_not_forgotten(run: Run) -> None:
    refused = run("forget-version", "order", "1")
    assert refused.exit_code == 1
    assert "has instances that have not ended" in str(refused.exception)


def test_a_rehearsal_says_who_stays_and_a_migration_wants_a_reason(run: Run) -> None:
    migrate = ("migrate", f"{APP}:second", "order", "--to", "2")
    rehearsed = run(*migrate, "--dry-run")
    assert rehearsed.exit_code == 1, "one must stay"
    assert rehearsed.stdout.startswith("1 can be migrated\n")
    assert "packed_too raised ValueError('this customer wants no box')" in rehearsed.stdout
    assert "say who does this, and why" in str(run(*migrate, "--by", "ada").exception)
    moved = run(*migrate, "--by", "ada", "--why", "new boxes")
    assert (moved.exit_code, moved.stdout.splitlines()[0]) == (1, "1 were migrated")


def test_new_code_is_checked_against_an_export(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "sagas.jsonl"
    file.write_text(run("export", "--saga", "order").stdout)
    assert len(file.read_text().splitlines()) == 2
    good = run("check", f"{APP}:second", str(file))
    assert (good.exit_code, good.stdout) == (0, "2 would go the same way, 0 would not\n")
    assert run("check", f"{APP}:second", "--live").stdout == good.stdout
    bad = run("check", "tests.support.poison_app:app", str(file))
    assert bad.exit_code == 1
    assert bad.stdout.startswith("0 would go the same way, 2 would not\n")
    assert "version 1 is not part of this application" in bad.stdout


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "say what to check: a file, or --live"),
        (("no-such-file",), "there is no file no-such-file"),
        (("-", "--live"), "say what to check: a file, or --live"),
    ],
)
def test_a_check_wants_a_file_or_the_database(run: Run, arguments: tuple[str, ...], why: str) -> None:
    assert str(run("check", f"{APP}:first", *arguments).exception) == why
