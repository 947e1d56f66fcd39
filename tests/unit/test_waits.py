"""Parts of a flow that wait: for an event of the business, or for time to pass."""

from datetime import timedelta
from typing import Any, Self

import pytest

from coordinator.acts import NotPossibleError
from coordinator.decision import Happened, Verb
from coordinator.definition import Saga
from coordinator.flow import parallel, sequence
from coordinator.instance import StepStatus
from coordinator.steps import completed, starts_on, step
from coordinator.testing import SagaRun
from coordinator.waits import awaits, delay
from events.errors import DefinitionError
from events.message import Command, Event


class Ordered(Event):
    order: str
    customer: str = "ann"


class Paid(Event):
    order: str
    payment: str


class Bounced(Event):
    order: str
    reason: str


class Reserve(Command):
    order: str


class Release(Command):
    order: str


class Ship(Command):
    order: str
    payment: str | None


class Shipped(Event):
    order: str


class Prepaid(Saga):
    """Nothing is shipped before it is paid."""

    order: str
    payment: str | None = None

    @starts_on(Ordered)
    @classmethod
    def ordered(cls, event: Ordered) -> Self:
        return cls(order=event.order)

    @step
    def reserve(self) -> Reserve:
        return Reserve(order=self.order)

    @reserve.compensation
    def release(self) -> Release:
        return Release(order=self.order)

    @awaits(Paid, by="order", timeout=3600)
    def paid(self, event: Paid) -> None:
        self.payment = event.payment

    @paid.declined_by(Bounced)
    def bounced(self, event: Bounced) -> None:
        self.payment = f"bounced: {event.reason}"

    @delay
    def objection_period(self) -> timedelta:
        return timedelta(days=1)

    @step
    def ship(self) -> Ship:
        return Ship(order=self.order, payment=self.payment)

    flow = sequence(reserve, paid, objection_period, ship)

    @completed
    def done(self) -> Shipped:
        return Shipped(order=self.order)


class Patient(Saga):
    """Goes on without what has not come."""

    order: str
    payment: str | None = None

    @starts_on(Ordered)
    @classmethod
    def ordered(cls, event: Ordered) -> Self:
        return cls(order=event.order)

    @awaits(Paid, by="order", timeout=60)
    def paid(self, event: Paid) -> None:
        self.payment = event.payment

    @paid.expired
    def unpaid(self) -> None:
        self.payment = "on account"

    @step
    def ship(self) -> Ship:
        return Ship(order=self.order, payment=self.payment)

    flow = sequence(paid, ship)


def prepaid() -> SagaRun:
    return SagaRun(Prepaid, Ordered(order="o-1")).succeeds()


def test_a_saga_waits_for_an_event_and_for_time_to_pass_and_goes_on() -> None:
    run = prepaid()
    assert run.instance.steps["paid"].status is StepStatus.WAITING
    assert run.last.waits[0].values == '["o-1"]'
    run.receives(Paid(order="o-1", payment="p-1"))
    assert run.last.over == ("paid",)
    assert run.sent == []
    run.passes(86_399)
    assert run.sent == []
    run.passes(1)
    assert run.sent == [Ship(order="o-1", payment="p-1")]
    assert run.succeeds().published == [Shipped(order="o-1")]


def test_an_event_that_does_not_come_in_time_turns_the_saga_back() -> None:
    run = prepaid().passes(3600)
    assert run.sent == [Release(order="o-1")]
    assert run.reason == "paid got no event in time"
    assert run.succeeds().status == "compensated"


def test_an_event_that_says_no_turns_the_saga_back_with_its_reason() -> None:
    run = prepaid().receives(Bounced(order="o-1", reason="no funds"))
    assert run.sent == [Release(order="o-1")]
    assert run.reason == "paid declined: no funds"
    assert run.saga.model_dump()["payment"] == "bounced: no funds"


def test_a_saga_can_go_on_without_an_event_that_does_not_come() -> None:
    run = SagaRun(Patient, Ordered(order="o-1")).gives_no_answer()
    assert run.instance.steps["paid"].status is StepStatus.EXPIRED
    assert run.sent == [Ship(order="o-1", payment="on account")]


def test_an_event_that_comes_too_late_is_noted_and_changes_nothing() -> None:
    run = SagaRun(Patient, Ordered(order="o-1")).gives_no_answer()
    run.receives(Paid(order="o-1", payment="p-1"))
    assert run.last.entry.kind == "late_event"
    assert run.saga.model_dump()["payment"] == "on account"
    run.succeeds()
    assert run.status == "completed"
    run.receives(Paid(order="o-1", payment="p-1"))
    assert (run.status, run.last.entry.kind) == ("completed", "late_event")


def test_an_event_that_comes_before_the_saga_waits_for_it_is_nobodys_yet() -> None:
    run = SagaRun(Prepaid, Ordered(order="o-1"))
    assert run.take(Happened("paid", Paid(order="o-1", payment="p"), "m", run.now)) is None


def test_what_goes_back_waits_for_nothing() -> None:
    class Beside(Prepaid):
        """A step beside the wait."""

        @step
        def invoice(self) -> Reserve:
            return Reserve(order="invoice")

        flow = sequence(Prepaid.reserve, parallel(Prepaid.paid, invoice), Prepaid.objection_period, Prepaid.ship)

    run = SagaRun(Beside, Ordered(order="o-1")).succeeds().declines("no", step="invoice")
    assert run.instance.steps["paid"].status is StepStatus.CALLED_OFF
    assert run.last.over == ("paid",)
    assert run.sent == [Release(order="o-1")]
    run.receives(Paid(order="o-1", payment="p-1"))
    assert run.last.entry.kind == "late_event"
    assert run.succeeds(step="reserve").status == "compensated"


def test_an_operator_skips_what_is_waited_for_or_gives_it_more_time() -> None:
    run = prepaid()
    with pytest.raises(NotPossibleError, match="paid waits"):
        run.acts(Verb.RETRY, "paid")
    run.acts(Verb.MOVE_DEADLINE, "paid", until=run.now + timedelta(hours=2)).passes(3600)
    assert run.instance.steps["paid"].status is StepStatus.WAITING
    run.acts(Verb.CANCEL_DEADLINE, "paid").passes(1e6)
    assert run.instance.steps["paid"].status is StepStatus.WAITING
    run.acts(Verb.SKIP, "paid").acts(Verb.SKIP, "objection_period")
    assert run.sent == [Ship(order="o-1", payment=None)]


@pytest.mark.parametrize("answer", [-1, True, "soon", None, float("nan"), timedelta(days=-1), 1e12])
def test_a_delay_that_is_no_time_turns_the_saga_back(answer: Any) -> None:
    class Hasty(Prepaid):
        """A delay that is none."""

        @delay
        def pause(self) -> Any:
            return answer

        flow = sequence(Prepaid.reserve, Prepaid.paid, Prepaid.objection_period, Prepaid.ship, pause)

    run = SagaRun(Hasty, Ordered(order="o-1")).succeeds().receives(Paid(order="o-1", payment="p"))
    run.passes(86_400).succeeds()
    assert run.reason is not None
    assert "pause cannot be waited for: it must return a number of seconds" in run.reason
    assert run.sent == [Release(order="o-1")]


def test_a_delay_of_nothing_is_over_at_once() -> None:
    class Quick(Prepaid):
        """Waits for nothing."""

        @delay
        def pause(self) -> int:
            return 0

        flow = sequence(pause, Prepaid.reserve, Prepaid.paid, Prepaid.objection_period, Prepaid.ship)

    assert SagaRun(Quick, Ordered(order="o-1")).sent == [Reserve(order="o-1")]


def test_an_empty_value_finds_nothing_and_turns_the_saga_back() -> None:
    class Lost(Patient):
        """What it is found by is not known."""

        parcel: str | None = None

        @awaits(Paid, by={"payment": "parcel"})
        def found(self, event: Paid) -> None:
            self.payment = event.payment

        flow = sequence(Patient.ship, Patient.paid, found)

    run = SagaRun(Lost, Ordered(order="o-1")).succeeds().receives(Paid(order="o-1", payment="p"))
    assert run.reason == "found cannot be waited for: Lost.parcel is empty, and found is found by it"


def test_several_values_and_other_names_find_the_saga() -> None:
    wait = awaits(Paid, by={"order": "order", "payment": "reference"})(print)
    paid = Paid(order="o-1", payment="p-1")

    class Known:
        order = "o-1"
        reference = "p-1"

    assert wait.values_of(paid, of_event=True) == wait.values_of(Known(), of_event=False) == '["o-1","p-1"]'
    assert awaits(Paid, by=("order", "payment"))(print).by == {"order": "order", "payment": "payment"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"by": ()}, "say with `by`"),
        ({"by": "order", "timeout": 0}, "timeout and keep are positive"),
        ({"by": "order", "keep": -1}, "timeout and keep are positive"),
        ({"by": "order", "early": "drop"}, "early is one of park, ignore, dead_letter, not 'drop'"),
    ],
)
def test_what_makes_no_sense_is_refused_where_it_is_written(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(DefinitionError, match=said):
        awaits(Paid, **arguments)


def test_a_wait_names_fields_that_both_have() -> None:
    with pytest.raises(DefinitionError, match="no field of Paid"):

        class Blind(Patient):
            """Found by what the event does not say."""

            @awaits(Paid, by="customer")
            def seen(self, event: Paid) -> None: ...

            flow = sequence(Patient.paid, Patient.ship, seen)

    with pytest.raises(DefinitionError, match="none of its fields"):

        class Deaf(Patient):
            """Found by what it does not know."""

            @awaits(Paid, by={"payment": "nothing"})
            def heard(self, event: Paid) -> None: ...

            flow = sequence(Patient.paid, Patient.ship, heard)
