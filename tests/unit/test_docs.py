"""The code in the documentation runs and prints what the page says."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.chart_text import text_chart
from coordinator.charts import mermaid
from coordinator.node import Node
from coordinator.settings import Settings
from coordinator.testing import SagaRun
from tests.support.flows import until

ROOT = Path(__file__).parents[2]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """Run the code of a page; return what it defines."""
    code = "\n".join(blocks(page, "python"))
    defined: dict[str, Any] = {"__name__": page.stem}
    exec(compile(code, str(page), "exec", dont_inherit=True), defined)
    return defined


ALL = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
PAGES = sorted(page.name for page in ROOT.glob("docs/*.md") if blocks(page, "python"))
OTHERS = {"console", "mermaid", "sh", "text"}  # languages of blocks that are not run
CODE = re.compile(r"\s*(import \w|from \S+ import |(async )?def \w|class .*:$|await \w|async with |@\w)")


def fenced(page: Path) -> list[tuple[str, list[str]]]:
    """Return all blocks of a page, however they are fenced or indented, with their languages."""
    found: list[tuple[str, list[str]]] = []
    fence = ""
    for line in page.read_text().splitlines():
        mark = re.match(r"[\s>]*(`{3,}|~{3,})(.*)", line)
        if fence and mark and mark[1].startswith(fence) and not mark[2].strip():
            fence = ""
        elif fence:
            found[-1][1].append(line)
        elif mark:
            fence = mark[1]
            found.append((mark[2].strip(), []))
    assert not fence, f"{page.name} ends within a block"
    return found


def test_no_python_stands_where_it_is_not_run() -> None:
    ran = [ROOT / "README.md", *(ROOT / "docs" / name for name in PAGES)]
    for page in ALL:
        found = fenced(page)
        python = ["\n".join([*lines, ""]) for language, lines in found if language == "python"]
        assert python == (blocks(page, "python") if page in ran else [])
        for language, lines in found:
            assert language == "python" or language in OTHERS, f"{page.name} has a block of {language!r}"
            code = [line for line in lines if language != "python" and CODE.match(line)]
            assert not code, f"{page.name} has Python in a block of {language!r}"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_prints_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / name
    run(page)
    expected = "".join(blocks(page, "text"))
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


def test_the_page_about_sagas_acts_on_them_from_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    defined = run(ROOT / "docs" / "sagas.md")

    async def begin() -> None:
        async with Node(defined["app"], Settings()) as node:
            for key in ("t-7", "t-8"):
                await node.publisher.publish(defined["TripWanted"](trip=key, abroad=False))

            async def both_have_begun() -> bool:
                return len(await node.store.list()) == len(["t-7", "t-8"])

            await until(both_have_begun)

    asyncio.run(begin())
    capsys.readouterr()
    asyncio.run(defined["call_off"]())
    said = capsys.readouterr().out.splitlines()
    assert said == ["t-7 only a running saga can be cancelled; this one is compensating", "t-8 done"]


def test_the_code_of_all_pages_is_right_where_it_is_not_come_to(tmp_path: Path) -> None:
    """Bodies of handlers and the like: their types are checked."""
    for page in (ROOT / "README.md", *(ROOT / "docs" / name for name in PAGES)):
        (tmp_path / f"page_{page.stem.replace('-', '_')}.py").write_text("\n".join(blocks(page, "python")))
    command = [sys.executable, "-m", "mypy", *map(str, tmp_path.glob("*.py"))]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


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
    assert ALL
    for page in ALL:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"
