"""The commands about versions, as a person reads them."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from typer.testing import CliRunner, Result

from coordinator import App, Settings, sequence, step
from coordinator.cli import cli
from coordinator.node import Node
from events.ids import TimeOrderedIds
from tests.support.flows import until
from tests.support.ledger_app import Order, OrderPlaced, Release, Reserve
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


class ReservePolitely(Reserve, type="reserve"):
    """The same command, with more words."""

    please: bool = True


class Polite(Order, name="order", version=1):
    """Version 1, whose first command says something else."""

    @step
    def reserve_goods(self) -> Reserve:
        return ReservePolitely(order_id=self.order_id)

    @reserve_goods.compensation
    def release_goods(self) -> Release:
        return Release(order_id=self.order_id)

    flow = sequence(reserve_goods, Order.charge_card, Order.ship_goods)


polite = App("ledger", sagas=[Polite])


def test_a_check_tells_other_words_from_another_way(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "sagas.jsonl"
    check = ("check", f"{__name__}:polite", str(file))
    file.write_text(run("export").stdout)
    under_way = run(*check)
    assert (under_way.exit_code, under_way.stdout.splitlines()[0]) == (1, "0 would go the same way, 2 would not")
    assert "reserve_goods is under way, and would say" in under_way.stdout
    for order in map(json.loads, file.read_text().splitlines()):
        resolve = ("resolve", f"{APP}:first", order["id"], "reserve_goods", "succeeded", "--why", "it is there")
        assert run(*resolve).exit_code == 0
    file.write_text(run("export").stdout)
    over = run(*check)
    head = "0 would go the same way, 2 with other words, 0 would not"
    assert (over.exit_code, over.stdout.splitlines()[0]) == (3, head)
    assert "it would send reserve for reserve_goods with" in over.stdout
    verdict = json.loads(run(*check, "--json").stdout)
    assert (verdict["same"], verdict["broken"], verdict["unclear"]) == (0, [], {})
    assert [(each["revision"], each["weight"]) for each in verdict["differing"]] == [(1, "differs"), (1, "differs")]


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
