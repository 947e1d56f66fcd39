"""The code in the documentation runs and prints what the page says."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.chart_text import text_chart
from coordinator.charts import mermaid
from coordinator.testing import SagaRun

ROOT = Path(__file__).parents[2]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """Run the code of a page; return what it defines."""
    code = "\n".join(blocks(page, "python"))
    defined: dict[str, Any] = {"__name__": page.stem}
    exec(compile(code, str(page), "exec", dont_inherit=True), defined)
    return defined


PAGES = ["approvals.md", "first-saga.md", "flows.md", "handlers.md", "sagas.md", "versions.md"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_prints_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / name
    run(page)
    [expected] = blocks(page, "text")
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == expected.splitlines()


def test_the_page_about_sagas_shows_the_charts_that_are_drawn() -> None:
    page = ROOT / "docs" / "sagas.md"
    defined = run(page)
    trip = SagaRun(defined["Trip"], defined["TripWanted"](trip="t-1", abroad=True))
    trip.succeeds(step="flight").succeeds(step="hotel").declines("the passport is too old").succeeds(step="flight")
    assert blocks(page, "mermaid") == [mermaid(trip.definition)]
    [shown] = blocks(page, "console")
    command, _, chart = shown.partition("\n")
    assert command == "$ coordinator sagas chart APP --of t-1 --format ascii"
    assert chart == text_chart(trip.definition, trip.instance)


def test_the_readme_example_is_a_whole_application(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run(ROOT / "README.md")


def test_the_example_sells_one_of_two_tickets_for_a_seat() -> None:
    command = [sys.executable, "examples/box_office.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.splitlines() == [
        "not sold: charge declined: the card was reported stolen",
        "not sold: hold declined: seat A1 is taken",
        "sold",
    ]


def test_the_example_has_one_of_two_large_orders_approved() -> None:
    command = [sys.executable, "examples/large_order.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert [line.rstrip() for line in run.stdout.splitlines()] == [
        "1 completed",
        "2 completed",
        "3 compensated order_approval declined: too much",
    ]


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    assert pages
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"
