"""What dead letters of one cause have in common, and what is kept of an error."""

import traceback
from collections.abc import Callable
from dataclasses import replace

import pytest

from events.codec import Limits
from events.dead_letters import DeadLetter, _detail
from events.intake import Intake, Item
from tests.support.flows import FakeDelivery

ITEM: Item = Intake(Limits()).read(FakeDelivery(b"[]"))[0]


def stack(work: Callable[[str], None], order: str = "1") -> str:
    with pytest.raises(ValueError, match=order) as raised:
        work(order)
    return "".join(traceback.format_exception(raised.value))


def letter(detail: str, *, consumer: str = "charge_card", error_type: str | None = "ValueError") -> DeadLetter:
    return DeadLetter(ITEM, consumer, "failed", detail, error_type=error_type)


def refuse(order: str) -> None:
    raise ValueError(f"order {order} is refused")


def refuse_elsewhere(order: str) -> None:
    raise ValueError(f"order {order} is refused")


def test_what_is_raised_at_one_place_has_one_fingerprint_whatever_it_says() -> None:
    first, second = (letter(stack(refuse, order)) for order in ("1", "two"))
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 12


def test_another_place_handler_reason_or_error_is_another_cause() -> None:
    cause = letter(stack(refuse))
    others = [
        letter(stack(refuse_elsewhere)),
        replace(cause, consumer="refund_card"),
        replace(cause, reason="crashed"),
        replace(cause, error_type="KeyError"),
    ]
    assert len({each.fingerprint for each in (cause, *others)}) == 5


def test_where_and_in_which_release_the_code_is_installed_is_no_other_cause() -> None:
    frame = 'Traceback (most recent call last):\n  File "{}", line {}, in charge\nValueError: no\n'
    here, there = frame.format("/srv/1.2/shop/cards.py", 10), frame.format("/opt/venv/shop/cards.py", 12)
    windows = frame.format("C:\\srv\\shop\\cards.py", 12)
    assert len({letter(each).fingerprint for each in (here, there, windows)}) == 1


def test_the_way_through_the_runtime_is_no_other_cause() -> None:
    business = '  File "/srv/shop/cards.py", line 1, in charge\n'
    first = '  File "/x/handlers/execution.py", line 178, in run\n' + business
    again = '  File "/y/tenacity/asyncio/__init__.py", line 9, in iter\n' + first
    assert letter(first).fingerprint == letter(again).fingerprint


def test_how_deep_a_recursion_was_is_no_other_cause() -> None:
    even, odd = (f'  File "/srv/shop/tree.py", line 1, in {name}\n' for name in ("even", "odd"))
    assert letter((even + odd) * 3).fingerprint == letter((even + odd) * 50).fingerprint


def test_without_a_stack_what_was_said_counts_but_not_its_particulars() -> None:
    one = letter("order 17 of '4d2d16e0-3f0b-4bd6-a2d6-2f4f6b5ee111' is unknown", error_type=None)
    other = letter("order 99 of 'x' is unknown", error_type=None)
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != letter("order 17 is too old", error_type=None).fingerprint


@pytest.mark.parametrize("piece", ["\n", '  File "', "'", "  | ", "\ud800"])
def test_no_text_makes_a_fingerprint_slow_or_impossible(piece: str) -> None:
    assert len(letter(piece * 200_000).fingerprint) == 12


def test_of_a_long_stack_both_ends_are_kept() -> None:
    kept = _detail("Traceback" + "x" * 20_000 + "\nValueError: the cause")
    assert len(kept) == 8000
    assert kept.startswith("Traceback")
    assert kept.endswith("ValueError: the cause")
    assert _detail("short") == "short"
