"""The page about faults names what is there, and leaves nothing out."""

import re
from pathlib import Path

from events.failpoints import NAMES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faults.md").read_text()
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
FAULTS = [*range(1, 10), *range(16, 28), *range(44, 54)]


def rows() -> dict[str, str]:
    return dict(re.findall(r"^\| F(\d+) \| (.*) \|$", PAGE, re.MULTILINE))


def test_each_fault_has_a_test_or_a_fail_point() -> None:
    without = [number for number in FAULTS if not re.search("`(test_f|[a-z]+\\.[a-z])", rows().get(str(number), ""))]
    assert without == []


def test_each_test_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named
    assert named - set(re.findall(r"def (test_\w+)\(", TESTS)) == set()


def test_each_test_of_a_fault_is_named_after_the_row_in_which_it_stands() -> None:
    for number, row in rows().items():
        assert set(re.findall(r"`test_f(\d+)_", row)) <= {number}


def test_each_fail_point_is_on_the_page() -> None:
    assert set(re.findall(r"`([a-z]+\.[a-z_]+)`", "".join(rows().values()))) == NAMES
