"""What the commands about history print: lines for people, an object of JSON a line for programs."""

from collections.abc import Mapping

from rich.console import Console

from coordinator.archive import Archived
from coordinator.invariants import Finding
from coordinator.verification import Checked
from coordinator.views import plain, print_json


def print_finding(console: Console, finding: Finding, *, as_json: bool) -> None:
    """Print what does not hold of a saga."""
    if as_json:
        document = {"saga_id": str(finding.saga_id), "invariant": finding.invariant, "detail": finding.detail}
        print_json(console, document)
        return
    console.print(plain(f"{finding.saga_id}  {finding.invariant:4} {finding.detail}"), soft_wrap=True)


def print_checked(console: Console, checked: Checked, counts: Mapping[str, int], *, as_json: bool) -> None:
    """Print how much was checked, and how often each invariant does not hold."""
    if as_json:
        sizes = {"sagas": checked.sagas, "transitions": checked.transitions, "retold": checked.retold}
        print_json(console, {"checked": sizes, "findings": dict(counts)})
        return
    named = ", ".join(f"{number} of {name}" for name, number in sorted(counts.items()))
    console.print(
        f"{checked.sagas} sagas with {checked.transitions} transitions, {checked.retold} of them retold: "
        + (f"{sum(counts.values())} findings, {named}" if counts else "all holds"),
        highlight=False,
    )


def print_planned(console: Console, sagas: int, keys: int, *, as_json: bool) -> None:
    """Print what would be archived."""
    if as_json:
        print_json(console, {"sagas": sagas, "keys": keys})
        return
    console.print(f"{sagas} sagas would be archived, some may have to stay; {keys} keys would be free", highlight=False)


def print_archived(console: Console, done: Archived, *, as_json: bool) -> None:
    """Print what was archived."""
    if as_json:
        print_json(console, {"sagas": done.sagas, "held": done.held, "keys": done.forgotten})
        return
    console.print(
        f"{done.sagas} sagas are archived, {done.held} stay for others; {done.forgotten} keys are free", highlight=False
    )
