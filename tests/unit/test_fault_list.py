"""The page about faults names what is there, and leaves nothing out."""

import re
from pathlib import Path

from events.failpoints import NAMES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faults.md").read_text()
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
OF_THE_BROKER = range(16, 28)
FAULTS = [*range(1, 10), *OF_THE_BROKER, *range(44, 54)]


def rows() -> dict[str, str]:
    """What the page says of each fault, in all of its tables."""
    found: dict[str, str] = {}
    for number, row in re.findall(r"^\| F(\d+) \| (.*) \|$", PAGE, re.MULTILINE):
        found[number] = found.get(number, "") + row + "\n"
    return found


def test_each_fault_has_a_test_or_a_fail_point() -> None:
    without = [number for number in FAULTS if not re.search("`(test_f|[a-z]+\\.[a-z])", rows().get(str(number), ""))]
    assert without == []


def test_each_fault_of_the_broker_says_what_holds_against_it() -> None:
    assert [number for number in OF_THE_BROKER if rows()[str(number)].count("\n") != 2] == []


def test_each_test_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named
    assert named - set(re.findall(r"def (test_\w+)\(", TESTS)) == set()


def test_each_test_of_a_fault_is_named_after_the_row_in_which_it_stands() -> None:
    for number, row in rows().items():
        assert set(re.findall(r"`test_f(\d+)_", row)) <= {number}


def test_each_fail_point_is_on_the_page() -> None:
    assert set(re.findall(r"`([a-z]+\.[a-z_]+)`", "".join(rows().values()))) == NAMES
