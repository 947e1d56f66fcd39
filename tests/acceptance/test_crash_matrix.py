"""Every fail point, with a kill, an exception and a cancel, on both stores: all ends well, all happens once.

Each defence is on its own: the deadlines of the steps are an hour, so that no command that is sent again hides what was
lost (redundancy hides bugs). What fails, fails once; then the process is started again, as systemd does it. The names
F1, F2... are those of the list of faults. Where a step has its own deadline, it is the deadline that is tested.

By default a part of the cases runs; CRASH_MATRIX=full (`make test-crash`) runs all.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp

import pytest

from events.failpoints import NAMES
from tests.support.base import Postgres, RabbitMQ
from tests.support.counts import note
from tests.support.crash_world import FilePlace, Ran, Script, ServerPlace, World
from tests.support.invariants import check_ledger, check_overdue

pytestmark = pytest.mark.acceptance

FULL = os.environ.get("CRASH_MATRIX") == "full"
SIDE_BY_SIDE = 8  # most of a case is waiting for leases to end
NUMBERS = [-number if number in {7, 13} else number for number in range(24)]
REFUSED = [5 * number for number in range(24)]

POSTGRES, SQLITE = STORES = ("postgres", "sqlite")  # with RabbitMQ, and with the embedded bus
ACTIONS = ("kill", "raise", "cancel")


@dataclass(frozen=True)
class Case:
    """Something that happens at a place. `after` says what the third party must have heard before."""

    fault: str
    place: str
    what: str
    store: str
    after: str = ""
    plant: str = ""

    @property
    def id(self) -> str:
        return f"{self.fault}-{self.place}{self.after and '@' + self.after}-{self.what}-{self.store}"

    @property
    def script(self) -> Script:
        hit = 2 if self.place in _PASSED_OFTEN and not self.after else 1
        crash_at = f"{self.place}:{self.what}:{hit}" + (f":{self.after}" if self.after else "")
        script = Script(crash_at, REFUSED if self.after else NUMBERS, plant=self.plant)
        if self.what == "stop":
            return replace(script, processes=2)
        match self.place:
            case "engine.timers_claimed" | "engine.timers_committed":
                return replace(script, overdue=True, timeout=1)
            case "handler.draining":
                return replace(script, stop_at=20)
            case "schema.before_commit":
                return replace(script, prepared=False)
        return script


PLACES = [
    ("F1", "handler.received", ""),
    ("F2", "handler.after_run", ""),
    ("F2", "handler.before_commit", ""),
    ("F4", "handler.after_commit", ""),
    ("F5", "handler.after_ack", ""),
    ("F6", "relay.claimed", ""),
    ("F6", "relay.before_publish", ""),
    ("F8", "relay.after_confirm", ""),
    ("F8", "relay.before_delete", ""),
    ("F10", "engine.received", ""),
    ("F10", "engine.before_commit", ""),
    ("F11", "engine.after_commit", ""),
    ("F11", "engine.after_ack", ""),
    ("F12", "engine.timers_claimed", ""),
    ("F12", "engine.timers_committed", ""),
    ("F12", "retries.before_claim", ""),
    ("F12", "retries.claimed", ""),
    ("F13", "engine.before_commit", "refund"),
    ("F13", "engine.after_commit", "refund"),
    ("F13", "handler.before_commit", "refund"),
    ("F13", "relay.before_publish", "refund"),
    ("F14", "schema.before_commit", ""),
    ("F14", "node.declared", ""),
    ("F14", "handler.draining", ""),
]
_PASSED_OFTEN = {place for _, place, _ in PLACES if place.startswith(("handler.", "engine."))} - {
    "engine.timers_claimed",
    "engine.timers_committed",
    "handler.draining",
}


def happens(case: Case) -> bool:
    """On the embedded bus the outbox is the bus: its relay has nothing to do after the first messages."""
    return case.store == POSTGRES or not (case.place.startswith("relay.") and case.after)


ALL = [
    case
    for (fault, place, after), what, store in itertools.product(PLACES, ACTIONS, STORES)
    if happens(case := Case(fault, place, what, store, after))
] + [
    Case(fault, place, "stop", POSTGRES, after)  # for longer than its leases, while another process goes on
    for fault, place, after in PLACES
    if not place.startswith(("schema.", "node.", "engine.timers")) and place != "handler.draining"
]


def _in_short(number: int, case: Case) -> bool:
    """Each place dies on one of the stores, and every third is left otherwise on the other."""
    here, there = STORES[number % 2], STORES[(number + 1) % 2]
    if not happens(replace(case, store=here)):
        here = there
    odd = ("raise", "cancel", "stop")[number // 3 % 3] if number % 3 == 0 else ""
    return (case.what, case.store) in {("kill", here), (odd, POSTGRES if odd == "stop" else there)}


SHORT = [
    case
    for number, place in enumerate(PLACES)
    for case in ALL
    if (case.fault, case.place, case.after) == place and _in_short(number, case)
]
CASES = ALL if FULL else SHORT
PLANTED = [
    Case("F2", "handler.before_commit", "kill", POSTGRES, plant="ack_first"),
    Case("F10", "engine.before_commit", "kill", POSTGRES, plant="engine_ack_first"),
    Case("F6", "relay.before_publish", "kill", POSTGRES, plant="delete_first"),
    Case("F11", "engine.after_commit", "kill", POSTGRES, plant="no_outbox"),
    Case("F2", "handler.before_commit", "kill", POSTGRES, plant="effect_apart"),
]


def check(world: World) -> None:
    place = world.place
    if world.script.overdue:
        check_overdue(place.ask, world.placed)
    else:
        check_ledger(place.ask, place.ask_outside, world.placed, witnessed=True, xids=place.xids)


@pytest.fixture(scope="module")
def runs(
    rabbitmq: RabbitMQ,
    postgres: Postgres,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Callable[[Case], Ran]]:
    """Runs all cases that were asked for side by side."""
    wanted = [item.callspec.params["case"] for item in request.session.items if _has_case(item)]
    base = tmp_path_factory.mktemp("cases")

    def run(case: Case) -> Ran:
        folder = Path(mkdtemp(dir=base))
        with ExitStack() as stack:
            here = FilePlace(folder) if case.store == SQLITE else ServerPlace(stack, rabbitmq, postgres)
            return World(case.script, here, folder, check).run()

    begun = time.monotonic()
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        futures: dict[Case, Future[Ran]] = {case: pool.submit(run, case) for case in wanted}
        yield lambda case: futures[case].result()
        pool.shutdown(cancel_futures=True)
    seconds = time.monotonic() - begun
    note(request.config, f"crash matrix: {len(futures)} cases in {seconds:.0f} s; all are {len(ALL) + len(PLANTED)}")


def _has_case(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and hasattr(item, "callspec") and "case" in item.callspec.params


def test_each_fail_point_is_a_place_of_the_matrix() -> None:
    assert {place for _, place, _ in PLACES} == NAMES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_all_sagas_end_well_and_all_effects_happen_once(case: Case, runs: Callable[[Case], Ran]) -> None:
    ran = runs(case)
    assert ran.problem is None, f"{ran.problem}\n{ran.log[-6000:]}"


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: case.plant)
def test_a_planted_bug_is_found(case: Case, runs: Callable[[Case], Ran]) -> None:
    """The checks are not toothless: without one defence, and with no other that hides it, an invariant is broken."""
    ran = runs(case)
    assert ran.problem is not None
    assert "fail point" not in ran.problem
