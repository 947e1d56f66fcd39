"""Every fail point, with a kill, an exception, a cancel and a stop, on all stores: all ends well, all happens once.

A process that is stopped (SIGSTOP) stands still for longer than all leases, and then goes on: what it holds may be
another one's by then (F39).

The deadlines of the steps are an hour, so that no command that is sent again hides what was lost; where deadlines are
the matter they are half a second. A tap on the wire to RabbitMQ says what was acknowledged and confirmed when. By
default a part of the cases runs; CRASH_MATRIX=full (`make test-crash`) runs all.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from events.failpoints import NAMES
from tests.support.base import Postgres, RabbitMQ
from tests.support.counts import note
from tests.support.crash_world import STORES, Case, Ran, World

pytestmark = pytest.mark.acceptance

SIDE_BY_SIDE = 6  # most of a case is waiting for leases to end
FULL = os.environ.get("CRASH_MATRIX") == "full"

PLACES = {
    "handler.received": "F1",
    "handler.after_run": "F2",
    "handler.before_commit": "F2",
    "handler.after_commit": "F4",
    "handler.after_ack": "F5",
    "relay.claimed": "F6",
    "relay.before_publish": "F7",
    "relay.after_confirm": "F8",
    "relay.before_delete": "F8",
    "engine.received": "F10",
    "engine.before_commit": "F10",
    "engine.after_commit": "F11",
    "engine.after_ack": "F11",
    "engine.timers_claimed": "F12",
    "engine.timers_committed": "F12",
    "retries.before_claim": "F12",
    "retries.claimed": "F12",
    "schema.before_commit": "F14",
    "node.declared": "F14",
    "handler.draining": "F14",
}
"""The fault of the list that a crash at a fail point is."""

REDELIVERED = "handler.before_commit:kill:2"  # what is delivered twice waits as a row
STOPPED = "handler.received:terminate:2"
LATE = "handler.received:stall:1"
BEFORE = {
    "retries.before_claim": REDELIVERED,
    "retries.claimed": REDELIVERED,
    "handler.draining": STOPPED,
    "engine.timers_claimed": LATE,
    "engine.timers_committed": LATE,
}
ONCE = {*BEFORE, "relay.claimed", "schema.before_commit", "node.declared"}
"""Where a process does not come twice for sure."""

SHORT_DEADLINES = (("LEDGER_TIMEOUT", "0.5"), ("LEDGER_RESENDS", "12"))
WHATS = ("kill", "raise", "cancel", "stop")
HOLDS_OTHERS = {"schema.before_commit"}
"""Where a process that stands still holds what all others need: they wait for it."""


def case(place: str, what: str, store: str) -> Case:
    """On the embedded bus the outbox is the bus: its relay has the orders to publish, and nothing after them."""
    once = place in ONCE or (store == "embedded" and place.startswith("relay."))
    deadlines = SHORT_DEADLINES if place.startswith("engine.timers") else ()
    return Case(
        place,
        what,
        store,
        BEFORE.get(place, ""),
        hit=1 if once else 2,
        environment=deadlines,
        short_leases=what == "stop" and not FULL,
        holds_others=place in HOLDS_OTHERS,
    )


ALL = [case(place, what, store) for place, what, store in itertools.product(PLACES, WHATS, STORES)]
# Each place is killed at, on one store after the other; at every second one there is an error or a cancel as well.
SHORT = [
    each
    for number, place in enumerate(PLACES)
    for each in [
        case(place, "kill", STORES[number % 3]),
        *([case(place, ("raise", "cancel")[number // 2 % 2], STORES[(number + 1) % 3])] if number % 2 else []),
    ]
]
SHORT += [
    case("handler.before_commit", "stop", "servers"),
    case("relay.before_publish", "stop", "servers"),
    case("engine.before_commit", "stop", "mixed"),
]
CASES = ALL if FULL else SHORT

# Each defence on its own: which is taken away, what happens where, and what must be found.
PLANTED = {
    ("ack_first", "kill"): ("handler.before_commit", "I6"),
    ("delete_first", "kill"): ("relay.before_publish", "I7"),
    ("no_inbox", "kill"): ("handler.after_commit", "I[23]"),  # of a saga that was completed, or undone
    ("no_inbox", "stop"): ("handler.before_commit", "I[23]"),
    ("no_outbox", "kill"): ("engine.after_commit", "I7"),
    ("two_transactions", "raise"): ("engine.after_ack", "I9"),
}
PLANTED_CASES = {
    (plant, what): replace(case(place, what, "servers"), plant=plant) for (plant, what), (place, _) in PLANTED.items()
}


def identify(case: Case) -> str:
    return f"{PLACES[case.place]}-{case.place}-{case.what}-{case.store}"


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, rabbitmq: RabbitMQ, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Case], Ran]]:
    """Runs all cases that are asked for side by side, from the first one on."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    asked_for = [_case_of(item.callspec.params) for item in items if "runs" in item.fixturenames]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        started: dict[Case, Future[Ran]] = {}

        def run(case: Case) -> Ran:
            for each in asked_for if not started else ():
                folder = tmp_path_factory.mktemp("case")
                started[each] = pool.submit(World(each, rabbitmq, postgres, folder).run)
            return started[case].result()

        yield run
    note(request.config, f"crash matrix: {len(started)} cases of {len(ALL) + len(PLANTED)}")


def _case_of(parameters: Mapping[str, Any]) -> Case:
    return PLANTED_CASES[parameters["planted"]] if "planted" in parameters else parameters["case"]


def test_every_fail_point_is_in_the_matrix() -> None:
    assert PLACES.keys() == NAMES
    assert {each.place for each in SHORT} == NAMES


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_all_sagas_end_well_and_all_effects_happen_once(case: Case, runs: Callable[[Case], Ran]) -> None:
    ran = runs(case)
    assert ran.problem is None, f"{ran.problem}\n{ran.log[-4000:]}"


@pytest.mark.parametrize("planted", PLANTED, ids="-".join)
def test_a_defence_that_is_taken_away_is_missed(planted: tuple[str, str], runs: Callable[[Case], Ran]) -> None:
    """The checks are not toothless: without one defence, and with no other that hides it, they say what is broken."""
    ran = runs(PLANTED_CASES[planted])
    _, invariant = PLANTED[planted]
    assert ran.problem is not None, "nothing was found"
    assert re.match(invariant, ran.problem), f"{ran.problem}\n{ran.log[-4000:]}"
