"""Flowcharts of sagas, as Mermaid and as plain text: every kind of part, and where it can stand."""

import re
from dataclasses import replace
from datetime import timedelta
from typing import Any, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from coordinator import Backoff, Saga, parallel, sequence, when
from coordinator.chart_text import text_chart
from coordinator.charts import mermaid
from coordinator.cli import cli
from coordinator.decision import Resolution, Verb
from coordinator.definition import SagaDefinition
from coordinator.durations import lasting
from coordinator.flow import Leaf, Node, nodes
from coordinator.flow import each as each_of
from coordinator.instance import Instance, Status
from coordinator.steps import completed, starts_on, step
from coordinator.testing import SagaRun
from coordinator.waits import awaits, delay
from events.errors import ConfigurationError
from events.message import Event
from examples.large_order import PlaceOrder
from tests.support.packing import Pack, Packed, Packing
from tests.support.trips import TripWanted, booking, is_far, run, saga
from tests.unit.test_fan_out import Delivery, Labelled, Ordered, Tolerant, delivery
from tests.unit.test_flow import World, flows


def lines(trip: SagaRun) -> list[str]:
    return text_chart(trip.definition, trip.instance).splitlines()


def line(trip: SagaRun, name: str) -> str:
    """The one line of a part, with its sign."""
    [found] = [each for each in lines(trip) if re.match(rf"\[?.\]? *(- )?{re.escape(name)}(:|$)", each)]
    return found


def drawn(trip: SagaRun) -> list[str]:
    return [each.strip() for each in mermaid(trip.definition, trip.instance).splitlines()]


class Paid(Event):
    trip: str


class Bounced(Event):
    trip: str


class Patient(Saga):
    """Waits for an event in every way."""

    trip: str

    @starts_on(TripWanted)
    @classmethod
    def wanted(cls, event: TripWanted) -> Self:
        return cls(trip=event.trip)

    @awaits(Paid, by="trip", timeout=90)
    def paid(self, _: Paid) -> None:
        """Nothing is kept."""

    @paid.declined_by(Bounced)
    def bounced(self, _: Bounced) -> None:
        """Nothing is kept."""

    @awaits(Paid, by="trip", timeout=7200)
    def tip(self, _: Paid) -> None:
        """Nothing is kept."""

    @tip.expired
    def stingy(self) -> None:
        """Nothing is kept."""

    @awaits(Paid, by="trip")
    def thanks(self, _: Paid) -> None:
        """Nothing is kept."""

    @delay
    def rest(self) -> timedelta:
        return timedelta(days=1)

    flow = sequence(paid, tip, rest, thanks)

    @completed
    def ended(self) -> None:
        """Nothing is said."""


# Definitions


def test_a_chart_shows_branches_and_choices_and_how_they_are_undone() -> None:
    flow = sequence(
        booking("a"), parallel(booking("b"), booking("c")), when(is_far, booking("d")), booking("e", undone=False)
    )
    chart = mermaid(saga(flow).definition)
    for edge in (
        "do_a --> do_b",
        "do_a --> do_c",
        "do_b --> join_1",
        "do_c --> join_1",
        "join_1 --> if_is_far",
        "if_is_far -->|yes| do_d",
        "if_is_far -->|no| do_e",
        "do_d --> do_e",
        "do_e --> completed",
        "do_a -. undo .-> undo_a",
        "undo_b -.-> undo_a",
        "undo_c -.-> undo_a",
        "undo_d -.-> undo_b",
        "undo_d -.-> undo_c",
        "undo_a -.-> compensated",
    ):
        assert f"    {edge}\n" in chart
    assert '    join_1{{"all 2"}}\n' in chart


def test_a_definition_as_plain_text_is_a_tree() -> None:
    flow = sequence(
        booking("a", timeout=90),
        parallel(sequence(booking("b"), booking("c")), booking("d", undone=False), needed=1, stragglers="keep"),
        when(is_far, booking("e", retry=Backoff(5)), otherwise=booking("f", undone=False)),
        booking("pay", undone=False, pivot=True, resends=2),
        booking("g", undone=False),
    )
    assert text_chart(saga(flow, deadline=86_400).definition).splitlines() == [
        "saga trip version 1",
        "  turns back unless it is done within 1 d, or past its pivot",
        "",
        "on trip.wanted",
        "a: within 90 s",
        "  undo: cancel_a: within 90 s, sent up to 6 times",
        "side by side: any of 2; the others go on beside what follows",
        "  - branch_1",
        "    b: within 5 min",
        "      undo: cancel_b: within 5 min, sent up to 6 times",
        "    c: within 5 min",
        "      undo: cancel_c: within 5 min, sent up to 6 times",
        "  - branch_2",
        "    d: within 5 min",
        "if is_far",
        "  e: within 5 min",
        "    undo: cancel_e: within 5 min, sent up to 6 times; up to 5 attempts",
        "else",
        "  f: within 5 min",
        "pay: within 5 min, sent up to 3 times; up to 10 attempts; pivot: no way back",
        "    after it",
        "g: within 5 min; up to 10 attempts",
        "completed",
        "compensated",
    ]


def test_a_branch_that_is_a_sequence_hangs_together_below_its_dash() -> None:
    flow = parallel(sequence(booking("a", undone=False), booking("b", undone=False)), booking("c", undone=False))
    assert text_chart(saga(flow).definition).splitlines()[2:8] == [
        "on trip.wanted",
        "side by side: all 2",
        "  - a: within 5 min",
        "    b: within 5 min",
        "  - c: within 5 min",
        "completed",
    ]


def test_a_wait_says_what_it_waits_for_and_what_follows_at_its_deadline() -> None:
    assert text_chart(Patient.definition).splitlines()[3:] == [
        "paid: waits for paid; bounced says no: turns back; within 90 s, else turns back",
        "tip: waits for paid; within 2 h, else goes on (stingy)",
        "rest: lets time pass",
        "thanks: waits for paid; as long as it takes",
        "completed: ended",
        "compensated",
    ]
    chart = mermaid(Patient.definition)
    assert '    do_tip>"tip<br/>waits for paid<br/>within 2 h, else goes on (stingy)"]\n' in chart
    assert '    completed(["completed: ended"])\n' in chart


def test_what_follows_on_a_wait_depends_on_where_it_stands() -> None:
    pay = booking("pay", undone=False, pivot=True)

    class Branched(Patient):
        """Goes on without a branch, and has no way back at the end."""

        @awaits(Paid, by="trip", timeout=5)
        def late(self, _: Paid) -> None:
            """Nothing is kept."""

        flow = sequence(
            parallel(Patient.paid, booking("other"), needed="any"), pay, late, Patient.thanks, Patient.tip, Patient.rest
        )

    chart = " ".join(text_chart(Branched.definition).split())
    assert "bounced says no: its branch turns back; within 90 s, else its branch turns back" in chart
    assert "late: waits for paid; within 5 s, else a person must look" in chart


def test_only_what_comes_after_a_pivot_for_certain_is_past_it() -> None:
    flow = sequence(when(is_far, booking("pay", undone=False, pivot=True)), booking("a"))
    assert "\na: within 5 min\n" in text_chart(saga(flow).definition)
    ways = when(
        is_far,
        booking("pay", undone=False, pivot=True),
        otherwise=booking("bill", undone=False, pivot=True),
    )
    assert "\na: within 5 min; up to 10 attempts\n" in text_chart(saga(sequence(ways, booking("a"))).definition)


def test_a_step_for_each_of_several_items_says_how_many_at_a_time() -> None:
    chart = " ".join(text_chart(Delivery.definition).split())
    assert "ship: for each of all_parcels, 2 at a time; within 1 min; one that fails undoes all" in chart
    assert "one that fails is left out" in " ".join(text_chart(Tolerant.definition).split())
    assert '    do_ship[["ship<br/>for each of all_parcels, 2 at a time<br/>' in mermaid(Delivery.definition)


def test_a_sequence_that_is_undone_side_by_side_is_drawn_so() -> None:
    flow = sequence(booking("z"), sequence(booking("a"), booking("b"), undo="side_by_side"))
    chart = mermaid(saga(flow).definition)
    assert "    do_a --> do_b\n" in chart
    assert "    undo_a -.-> undo_z\n    undo_b" in chart
    assert "    undo_b -.-> undo_z\n" in chart
    assert "undo_b -.-> undo_a" not in chart
    assert "one after the other, undone side by side\n  a: within" in text_chart(saga(flow).definition)


def test_many_branches_after_many_have_no_more_arrows_than_mermaid_draws() -> None:
    first, second = ([booking(f"{letter}{number}") for number in range(40)] for letter in "ab")
    chart = mermaid(saga(sequence(parallel(*first), parallel(*second))).definition)
    assert "    undo_b39 -.-> back_1\n" in chart
    assert "    back_1 -.-> undo_a39\n" in chart
    assert sum("->" in each or "-. " in each for each in chart.splitlines()) == 9 * 40 + 1


def test_a_step_that_starts_another_saga_names_it() -> None:
    class Parent(Saga):
        """Has a child."""

        order: str

        @starts_on(Ordered)
        @classmethod
        def ordered(cls, event: Ordered) -> Self:
            return cls(order=event.order)

        @step
        def pack(self) -> Pack:
            return Pack(order=self.order)

        flow = sequence(pack)

    others = [Parent.definition, Packing.definition]
    assert "\npack: within 5 min; saga packing\n" in text_chart(Parent.definition, None, others)
    assert 'do_pack["pack<br/>within 5 min<br/>saga packing"]' in mermaid(Parent.definition, None, others)
    assert "\non pack\n" in text_chart(Packing.definition)
    assert Packed.message_type not in text_chart(Parent.definition, None, others)


# Instances


def test_an_instance_says_what_is_done_under_way_left_and_not_taken() -> None:
    flow = sequence(
        booking("a"), when(is_far, booking("b"), otherwise=booking("c", undone=False)), booking("d", undone=False)
    )
    trip = run(flow, deadline=3600).succeeds()
    assert lines(trip) == [
        "saga trip version 1, 1: running",
        "  turns back at 2026-01-01 01:00:00 UTC unless it is done",
        "",
        "[x] on trip.wanted",
        "[x] a",
        "      undo: cancel_a",
        "[x] if is_far: no",
        "[-]   b",
        "        undo: cancel_b",
        "    else",
        "[>]   c: answer by 2026-01-01 00:05:00 UTC",
        "[ ] d: within 5 min",
        "[ ] completed",
        "[-] compensated",
        "",
        "[x] done  [>] running  [ ] left  [-] not taken",
    ]
    chart = drawn(trip)
    assert {"class do_a done", "class if_is_far done", "class do_b not_taken", "class do_c running"} <= set(chart)
    assert {"class do_d left", "class completed left", "class compensated not_taken"} <= set(chart)
    edges = [each for each in chart if "-->" in each or "-." in each]
    [grey] = [each for each in chart if each.startswith("linkStyle")]
    assert [edges[int(number)] for number in grey.split()[1].split(",")] == [
        "if_is_far -->|yes| do_b",
        "do_b --> do_d",
    ]


def test_a_saga_on_its_way_back_says_what_is_undone_and_what_is_to_be_undone() -> None:
    trip = run(sequence(booking("a"), booking("b"), booking("c"), booking("d"))).succeeds().succeeds()
    trip.declines("no").succeeds()
    assert lines(trip) == [
        "saga trip version 1, 1: compensating",
        "  because c declined: no",
        "",
        "[x] on trip.wanted",
        "[<] a",
        "[>]   undo: cancel_a: answer by 2026-01-01 00:05:00 UTC",
        "[u] b",
        "[x]   undo: cancel_b",
        "[!] c: declined",
        "      undo: cancel_c",
        "[-] d",
        "      undo: cancel_d",
        "[-] completed",
        "[ ] compensated",
        "",
        "[x] done  [>] running  [ ] left  [!] failed  [<] being undone  [u] undone",
        "[-] not taken",
    ]
    chart = drawn(trip)
    assert 'undo_a[/"cancel_a<br/>running<br/>answer by 2026-01-01 00:05:00 UTC"/]' in chart
    assert {"class do_a being_undone", "class undo_a running", "class do_b undone", "class undo_b done"} <= set(chart)
    assert {"class do_c failed", "class do_d not_taken"} <= set(chart)
    assert 'compensated(["compensated<br/>c declined: no"])' in chart
    trip.succeeds()
    assert line(trip, "compensated") == "[x] compensated"
    assert "class compensated done" in drawn(trip)


def test_an_archived_saga_is_not_drawn_as_one_that_has_done_nothing() -> None:
    flow = sequence(booking("a"))
    instance = replace(run(flow).instance, status=Status.ARCHIVED, steps={}, state={})
    definition = saga(flow).definition
    for draw in (mermaid, text_chart):
        with pytest.raises(ConfigurationError, match=r"saga .* is archived: how far it came is in the file"):
            draw(definition, instance)


def test_a_saga_with_a_lock_says_so_and_whether_it_waits_for_its_turn() -> None:
    class Locked(Saga, lock="trip", deadline=60):
        """One at a time."""

        trip: str

        @starts_on(TripWanted)
        @classmethod
        def wanted(cls, event: TripWanted) -> Self:
            return cls(trip=event.trip)

        flow = sequence(booking("a"))

    head = ["  one at a time of each trip", "  turns back unless it is done within 1 min"]
    assert text_chart(Locked.definition).splitlines()[1:3] == head
    assert "<br/>one at a time of each trip<br/>" in mermaid(Locked.definition)
    trip = SagaRun(Locked, TripWanted(trip="1"), waiting=True)
    assert lines(trip)[:5] == [
        "saga locked version 1, 1: waiting",
        "  waits until no other saga holds its trip",
        "",
        "[x] on trip.wanted",
        "[ ] a: within 5 min",
    ]
    trip.is_granted()
    assert lines(trip)[1:2] == ["  turns back at 2026-01-01 00:01:00 UTC unless it is done"]


def test_what_is_still_to_be_undone_is_left() -> None:
    trip = run(sequence(booking("a"), booking("b"))).succeeds().gives_no_answer()
    assert line(trip, "undo: cancel_a") == "[ ]   undo: cancel_a"
    assert "class undo_a left" in drawn(trip)


def test_a_step_of_which_nobody_knows_has_a_sign_of_its_own() -> None:
    trip = run(sequence(booking("a"), booking("b", undone=False))).succeeds().gives_no_answer()
    assert line(trip, "b") == "[?] b"
    assert "class do_b not_known" in drawn(trip)


def test_a_compensation_that_failed_calls_a_person_after_its_attempts() -> None:
    trip = run(sequence(booking("a", retry=Backoff(2, first=60)), booking("b"))).succeeds().declines("no").fails("shut")
    assert line(trip, "undo: cancel_a").startswith("[>]   undo: cancel_a: attempt 1 of 2; next attempt at 2026-01-01")
    trip.passes(60).fails("shut for good")
    assert line(trip, "a") == "[!] a"
    assert line(trip, "undo: cancel_a") == "[!]   undo: cancel_a: attempt 2 of 2"
    assert lines(trip)[0].endswith(": needs attention")
    chart = drawn(trip)
    assert "undo_a -.-> needs_attention" in chart
    assert "class needs_attention failed" in chart


def test_what_was_undone_by_hand_has_a_compensation_that_was_not_taken() -> None:
    trip = run(sequence(booking("a"), booking("b"), booking("c"))).succeeds().succeeds().declines("no")
    trip.acts(Verb.RESOLVE, "a", resolution=Resolution.UNDONE)
    assert (line(trip, "a"), line(trip, "undo: cancel_a")) == ("[u] a", "[-]   undo: cancel_a")


def test_past_its_pivot_a_step_is_tried_anew_and_then_a_person_must_look() -> None:
    pay = booking("pay", undone=False, pivot=True)
    trip = run(sequence(pay, booking("a", undone=False, recovery=Backoff(2, first=10)))).succeeds().fails()
    assert line(trip, "pay") == "[x] pay: pivot: no way back after it"
    assert line(trip, "a") == "[>] a: retrying; attempt 1 of 2; next attempt at 2026-01-01 00:00:10 UTC"
    trip.passes(10).fails("again")
    chart = drawn(trip)
    assert "do_a -.-> needs_attention" in chart
    assert 'needs_attention(["needs attention<br/>a failed: failed: again"])' in chart
    assert "class do_pay pivot" in chart
    trip.acts(Verb.RETRY, "a")
    assert line(trip, "a") == "[>] a: attempt 3; answer by 2026-01-01 00:05:10 UTC"


def test_a_command_that_was_sent_again_is_counted() -> None:
    trip = run(sequence(booking("a", timeout=10, resends=2))).gives_no_answer()
    assert line(trip, "a") == "[>] a: sent 2 times; answer by 2026-01-01 00:00:30 UTC"


def test_waits_say_until_when_and_what_follows() -> None:
    trip = SagaRun(Patient, TripWanted(trip="1"))
    assert lines(trip)[3:5] == [
        "[>] paid: waiting; for paid or bounced; until 2026-01-01 00:01:30 UTC, then",
        "        turns back",
    ]
    trip.receives(Paid(trip="1"))
    assert line(trip, "tip").startswith("[>] tip: waiting; for paid; until 2026-01-01 02:00:00 UTC, then goes on")
    trip.gives_no_answer()
    assert line(trip, "tip") == "[x] tip: expired; nothing came in time"
    assert line(trip, "rest") == "[>] rest: waiting; until 2026-01-02 02:00:00 UTC"
    trip.gives_no_answer()
    assert line(trip, "thanks") == "[>] thanks: waiting; for paid; as long as it takes"
    assert "class do_thanks running" in drawn(trip)
    trip.acts(Verb.CANCEL)
    assert line(trip, "thanks") == "[~] thanks"
    assert "class do_thanks called_off" in drawn(trip)


def test_items_are_counted() -> None:
    trip = delivery(5).succeeds(Labelled(label="b"), step="ship[1]")
    assert line(trip, "ship") == "[>] ship: 3 of 5 begun; 2 under way"
    trip.declines("no", step="ship[0]")
    assert line(trip, "ship") == "[<] ship: 3 of 5 begun; 2 under way; 1 failed"
    assert line(trip, "undo: call_back").startswith("[>]   undo: call_back")
    trip.succeeds(step="ship[1]").declines("no", step="ship[2]").succeeds()
    assert (line(trip, "ship"), line(trip, "undo: call_back")) == (
        "[u] ship: 3 of 5 begun; 2 failed",
        "[x]   undo: call_back",
    )


def test_an_item_that_could_not_be_undone_is_counted_and_calls_a_person() -> None:
    trip = delivery(3, Tolerant).fails(step="ship[0]").fails(step="ship[0]")
    trip.succeeds(Labelled(label="b"), step="ship[1]").succeeds(Labelled(label="c"), step="ship[2]")
    assert line(trip, "ship") == "[!] ship: 3 of 3 begun; 1 failed; 1 could not be undone"
    assert "do_ship -.-> needs_attention" in drawn(trip)


def test_items_that_nothing_undoes_are_called_off() -> None:
    class Final(Delivery):
        """Cannot call a parcel back."""

        @step
        def send(self, item: Any) -> Pack:
            return Pack(order=item)

        def orders(self) -> list[str]:
            return ["x", "y"]

        flow = sequence(Delivery.pick, each_of(orders, send), each_of(Delivery.all_parcels, Delivery.ship))

    trip = delivery(1, Final).declines("no", step="send[0]").succeeds(step="send[1]")
    assert line(trip, "send") == "[~] send: 2 of 2 begun; 1 failed"


def branched() -> SagaRun:
    """Two of three are needed, and the others are undone; then one more step."""
    first = sequence(booking("a"), booking("b"))
    return run(sequence(parallel(first, booking("c"), booking("d", undone=False), needed=2), booking("e")))


def test_branches_say_how_each_of_them_stands_and_the_join_how_many_are_done() -> None:
    trip = branched().succeeds(step="a").succeeds(step="c")
    assert "    side by side: 2 of 3 needed; the others are then undone; 1 done" in lines(trip)
    assert (line(trip, "branch_1"), line(trip, "branch_2")) == ("[>]   - branch_1", "[x]   - branch_2")
    assert "class join_1 done" not in drawn(trip)
    trip.succeeds(step="d")
    assert line(trip, "branch_1") == "[<]   - branch_1"
    assert line(trip, "undo: cancel_a") == "[ ]       undo: cancel_a"
    chart = drawn(trip)
    assert "started -->|branch_1: being undone| do_a" in chart
    assert 'join_1{{"2 of 3 needed<br/>the others are then undone<br/>2 done"}}' in chart
    assert "class join_1 done" in chart
    trip.declines("no", step="b").succeeds(step="a")
    assert (line(trip, "branch_1"), line(trip, "b")) == ("[u]   - branch_1", "[!]     b: declined")
    assert (line(trip, "branch_2"), line(trip, "e")[:5]) == ("[x]   - branch_2", "[>] e")


def test_a_branch_that_could_not_be_undone_has_failed_and_what_was_not_begun_in_it_is_not_taken() -> None:
    trip = branched().fails(step="a").fails(step="a").succeeds(step="c").succeeds(step="d").succeeds()
    assert trip.status == "needs_attention"
    assert (line(trip, "branch_1"), line(trip, "b")) == ("[!]   - branch_1", "[-]     b")


def test_branches_of_a_saga_that_turns_back_go_back_with_it() -> None:
    trip = branched().succeeds(step="a").succeeds(step="c").succeeds(step="d").succeeds(step="b")
    trip.declines("no", step="e")
    assert (line(trip, "branch_2"), line(trip, "branch_3")) == ("[<]   - branch_2", "[x]   - branch_3")
    trip.succeeds(step="c")
    assert line(trip, "branch_2") == "[u]   - branch_2"
    assert "    side by side: 2 of 3 needed; the others are then undone; 0 done" in lines(trip)


def test_branches_that_are_all_needed_are_counted_too() -> None:
    inner = parallel(booking("c"), booking("d"), needed="any", stragglers="keep")
    chosen = when(is_far, booking("x"), otherwise=inner)
    trip = run(
        sequence(parallel(booking("a"), sequence(chosen, booking("b")), when(is_far2, booking("y"))), booking("e"))
    )
    assert "    side by side: all 3; 1 done" in lines(trip)  # the condition without another way
    trip.succeeds(step="c").succeeds(step="b")
    assert "    side by side: all 3; 2 done" in lines(trip)
    assert "    side by side: all 3; 3 done" in lines(trip.succeeds(step="a"))


def is_far2(self: Any) -> bool:
    return bool(self.far)


# The command line, what comes from outside, and what always holds


def test_the_command_draws_the_sagas_of_an_application_in_the_format_that_is_asked_for() -> None:
    command = ["sagas", "chart", "examples.large_order:app"]
    chart = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert chart.stdout == mermaid(PlaceOrder.definition)
    text = CliRunner().invoke(cli, [*command, "place_order", "--format", "ascii"], catch_exceptions=False)
    assert text.stdout == text_chart(PlaceOrder.definition)
    assert CliRunner().invoke(cli, [*command, "--format", "svg"]).exit_code == 2


@pytest.mark.parametrize("key", ['x"] --> y', "<script>", "a\x1b[31m\nb", "#quot; & `code` \\"])
def test_nothing_from_outside_is_taken_for_a_part_of_the_chart(key: str) -> None:
    trip = SagaRun(saga(booking("a")), TripWanted(trip=key))
    [started] = [each for each in drawn(trip) if each.startswith("started(")]
    label = started.removeprefix('started(["').removesuffix('"])').replace("<br/>", "")
    assert not set(label) & set('"<>`&\\\x1b')
    assert all(each.isprintable() for each in lines(trip))
    assert len(drawn(trip)) == len(drawn(SagaRun(saga(booking("a")), TripWanted(trip="plain"))))


def test_steps_may_be_called_like_words_of_mermaid() -> None:
    chart = mermaid(saga(sequence(booking("end"), booking("completed"), booking("undo_end"))).definition)
    ids = [found[1] for each in chart.splitlines() if (found := re.match(r"    (\w+)[\[({>]", each))]
    assert len(set(ids)) == len(ids)
    assert "end" not in ids


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.5, "0.5 s"), (60, "1 min"), (90, "90 s"), (7200, "2 h"), (2_592_000, "30 d"), (1_234_567, "1234567 s")],
)
def test_times_are_exact_in_the_largest_unit_that_goes_into_them(seconds: float, words: str) -> None:
    assert lasting(seconds) == words


@settings(deadline=None)
@given(flows(), st.data())
def test_any_flow_can_be_drawn_wherever_it_stands(flow: Node, data: st.DataObject) -> None:
    """Every part has one line and one node, and arrows lead from node to node."""
    world = World(flow, data)
    world.play()
    definition = world.trip.definition
    for decision in [None, *world.trip.decisions]:
        check(definition, None if decision is None else decision.instance)


def check(definition: SagaDefinition, instance: Instance | None) -> None:
    chart, text = mermaid(definition, instance), text_chart(definition, instance)
    assert all(len(each) <= 80 for each in text.splitlines())
    assert text.isascii()
    ids = re.findall(r'^    (\w+)(?:\["|\[\["|\{"|\{\{"|>"|\(\["|\[/")', chart, re.MULTILINE)
    assert len(set(ids)) == len(ids)
    ends = re.findall(r"^    (\w+) (?:-->(?:\|[^|]*\|)?|-\. undo \.->|-\.->) (\w+)$", chart, re.MULTILINE)
    assert {each for pair in ends for each in pair} <= set(ids)
    for node in nodes(definition.flow):
        if isinstance(node, Leaf):
            assert f"do_{node.name}" in ids
            assert len(re.findall(rf"^[^:]*\b{node.name}(?::|$)", text, re.MULTILINE)) == 1
    classes = dict(re.findall(r"^    class (\w+) (?!pivot)(\w+)$", chart, re.MULTILINE))
    assert set(classes) <= set(ids)
    assert (instance is None) == (not classes)
