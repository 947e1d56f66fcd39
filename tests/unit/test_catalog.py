"""The shipped events and values, and the shipped sagas decided on by hand."""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, get_args, get_type_hints
from uuid import UUID

import pytest
from pydantic import TypeAdapter, ValidationError

from coordinator.catalog import PlaceOrder, SignUp, app
from coordinator.charts import mermaid
from coordinator.definition import Saga
from coordinator.instance import Status, StepStatus
from events.catalog import orders, payments, users
from events.catalog.orders import (
    CancelShipment,
    OrderCancelled,
    OrderCompleted,
    OrderPlaced,
    OrderShipped,
    ReleaseStock,
    ReserveStock,
    ShipmentRefused,
    ShipOrder,
    StockShort,
)
from events.catalog.payments import ChargeCard, PaymentCaptured, PaymentFailed, RefundCard
from events.catalog.users import (
    AccountActivated,
    AccountRefused,
    CreateDefaultSettings,
    NotifyAdmins,
    RemoveSettings,
    SendRefusalEmail,
    SendWelcomeEmail,
    SubscribeToMailingList,
    UnsubscribeFromMailingList,
    UserRegistered,
)
from events.catalog.values import Email, Money, Name, Sku, UserName
from events.envelope import Result
from events.errors import InvalidMessageError
from events.message import Command, Event, Message
from events.registry import Registry
from tests.support.flows import enveloped
from tests.support.sagas import Run

USER = UUID("01900000-0000-7000-8000-00000000000a")
ORDER = UUID("01900000-0000-7000-8000-00000000000b")
TOTAL = Money(minor=1990, currency="EUR")
REGISTERED = UserRegistered(user_id=USER, user_name="ada", full_name="Ada Lovelace", email="ada@example.com")
PLACED = OrderPlaced(
    order_id=ORDER, customer="Ada", sku="lamp-1", quantity=2, total=TOTAL, card="tok_1", address="1 High Street"
)


# Events


TYPES = {
    "user.registered": 2,
    "account.activated": 1,
    "account.refused": 1,
    "create.default.settings": 1,
    "remove.settings": 1,
    "send.welcome.email": 1,
    "send.refusal.email": 1,
    "subscribe.to.mailing.list": 1,
    "unsubscribe.from.mailing.list": 1,
    "notify.admins": 1,
    "order.placed": 1,
    "order.completed": 1,
    "order.cancelled": 1,
    "reserve.stock": 1,
    "release.stock": 1,
    "stock.short": 1,
    "ship.order": 1,
    "cancel.shipment": 1,
    "order.shipped": 1,
    "shipment.refused": 1,
    "charge.card": 1,
    "refund.card": 1,
    "payment.captured": 1,
    "payment.failed": 1,
    "payment.refunded": 1,
}


def shipped(module: ModuleType) -> list[type[Message]]:
    return [
        each
        for each in vars(module).values()
        if inspect.isclass(each) and issubclass(each, Message) and each.__module__ == module.__name__
    ]


def test_types_and_versions_on_the_wire_are_what_others_rely_on() -> None:
    classes = [each for module in (users, orders, payments) for each in shipped(module)]
    assert {each.message_type: each.message_version for each in classes} == TYPES
    assert len(classes) == len(TYPES)


@pytest.mark.parametrize("message", [REGISTERED, PLACED, PaymentCaptured(order_id=ORDER, charge_id="c", amount=TOTAL)])
def test_a_message_is_the_same_after_the_wire(message: Event) -> None:
    assert Registry([type(message)]).read(enveloped(message)) == message


OLD = {"user_id": str(USER), "user_name": "ada", "email": "ada@example.com"}


def read_version_1(document: Any) -> Message:
    envelope = enveloped(REGISTERED)
    envelope.version, envelope.data = 1, json.dumps(document).encode()
    return Registry([UserRegistered]).read(envelope)


@pytest.mark.parametrize(
    ("names", "full"),
    [
        ({"first_name": "Ada", "last_name": "Lovelace"}, "Ada Lovelace"),
        ({"first_name": "Ada", "last_name": ""}, "Ada"),
        ({"first_name": "Ada", "last_name": None}, "Ada"),
        ({"last_name": "Lovelace"}, "Lovelace"),
        ({"first_name": "  ", "last_name": "Lovelace"}, "Lovelace"),
        ({"first_name": "Åsa-Lena", "last_name": "d'Arc 李"}, "Åsa-Lena d'Arc 李"),
        ({"first_name": "Ada", "last_name": "Lovelace", "full_name": "not of version 1"}, "Ada Lovelace"),
    ],
)
def test_a_registration_of_version_1_has_its_names_joined(names: dict[str, str | None], full: str) -> None:
    assert read_version_1({**OLD, **names}) == REGISTERED.model_copy(update={"full_name": full})


@pytest.mark.parametrize(
    "document",
    [OLD, {**OLD, "first_name": "", "last_name": " "}, {**OLD, "first_name": 7}, {**OLD, "last_name": ["x"]}, [], None],
    ids=["no name", "blank names", "a number", "a list", "no object", "nothing"],
)
def test_a_registration_of_version_1_without_a_name_is_rejected(document: object) -> None:
    """It is a dead letter and not a crash: the sender's mistake spoils one message."""
    with pytest.raises(InvalidMessageError):
        read_version_1(document)


# Values


def test_money_is_exact_and_its_own_value() -> None:
    assert Money.model_validate_json(TOTAL.model_dump_json()) == TOTAL
    with pytest.raises(ValidationError, match="frozen"):
        TOTAL.__setattr__("minor", 1)


@pytest.mark.parametrize(
    "minor",
    [
        0,
        -1,
        10**12 + 1,
        19.9,
        "19.90",
        float("nan"),
        float("inf"),
        None,
        True,
        "5",
        5.0,
    ],
)
def test_money_refuses_an_amount_that_is_none(minor: Any) -> None:
    with pytest.raises(ValidationError, match="minor"):
        Money(minor=minor, currency="EUR")


@pytest.mark.parametrize("currency", ["", "EU", "EURO", "eur", "EUR\n", " EUR", "€"])
def test_money_refuses_a_currency_that_is_none(currency: str) -> None:
    with pytest.raises(ValidationError, match="currency"):
        Money(minor=1, currency=currency)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *[(Email, wrong) for wrong in ("ada", "@example.com", "ada@", "a b@c", "a@b@c", "a@b\nBcc: x@y")],
        *[(UserName, wrong) for wrong in ("", "Ada", "1ada", "ada!", "a" * 41, "ada\n")],
        *[(Sku, wrong) for wrong in ("", "a b", "ä", "a" * 61, "a/../b")],
        *[(Name, wrong) for wrong in ("", " \t ", "x" * 201)],
    ],
)
def test_a_value_that_cannot_be_one_is_refused(kind: Any, value: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(value)


@pytest.mark.parametrize("quantity", [0, -1, 10_001])
def test_nobody_orders_nothing_or_less(quantity: int) -> None:
    with pytest.raises(ValidationError, match="quantity"):
        OrderPlaced.model_validate({**PLACED.model_dump(), "quantity": quantity})


# Sagas


@dataclass(frozen=True)
class Part:
    """A step as it must be: what is sent, what comes back, what undoes it."""

    step: str
    do: Command
    undo: Command | None
    outcome: Message | None = None
    no: Message | None = None


@dataclass(frozen=True)
class Story:
    """A saga with what it must say."""

    saga: type[Saga]
    start: Event
    parts: Sequence[Part]
    good_end: Event
    bad_end: Event

    def run(self) -> Run:
        return Run(saga=self.saga, event=self.start)

    def run_to(self, step: str) -> Run:
        run = self.run()
        for part in self.parts:
            if part.step == step:
                break
            run.succeeds(part.outcome)
        return run

    def undo_all(self, run: Run) -> list[Command]:
        """Let every compensation succeed; return them in order."""
        undone = []
        while run.status is Status.COMPENSATING:
            [command] = run.sent
            undone.append(command)
            run.succeeds()
        return undone

    def undos_before(self, step: str, *, inclusive: bool) -> list[Command]:
        """Return the compensations of all steps before `step` in reverse."""
        names = [part.step for part in self.parts]
        begun = self.parts[: names.index(step) + inclusive]
        return [part.undo for part in reversed(begun) if part.undo is not None]

    def withdrawn(self, reason: str) -> Event:
        return self.bad_end.model_copy(update={"reason": reason})


SIGN_UP = Story(
    SignUp,
    REGISTERED,
    [
        Part(
            "create_settings", CreateDefaultSettings(user_id=USER, user_name="ada"), undo=RemoveSettings(user_id=USER)
        ),
        Part(
            "send_welcome",
            SendWelcomeEmail(user_id=USER, full_name="Ada Lovelace", email="ada@example.com"),
            undo=SendRefusalEmail(user_id=USER, full_name="Ada Lovelace", email="ada@example.com"),
        ),
        Part(
            "subscribe",
            SubscribeToMailingList(user_id=USER, email="ada@example.com"),
            undo=UnsubscribeFromMailingList(user_id=USER, email="ada@example.com"),
        ),
        Part("notify", NotifyAdmins(user_id=USER, user_name="ada", full_name="Ada Lovelace"), undo=None),
    ],
    good_end=AccountActivated(user_id=USER),
    bad_end=AccountRefused(user_id=USER, reason=""),
)
PLACE_ORDER = Story(
    PlaceOrder,
    PLACED,
    [
        Part(
            "reserve",
            ReserveStock(order_id=ORDER, sku="lamp-1", quantity=2),
            undo=ReleaseStock(order_id=ORDER),
            no=StockShort(sku="lamp-1", reason="gone"),
        ),
        Part(
            "charge",
            ChargeCard(order_id=ORDER, amount=TOTAL, card="tok_1"),
            undo=RefundCard(order_id=ORDER),
            outcome=PaymentCaptured(order_id=ORDER, charge_id="ch-1", amount=TOTAL),
            no=PaymentFailed(order_id=ORDER, reason="gone"),
        ),
        Part(
            "ship",
            ShipOrder(order_id=ORDER, address="1 High Street"),
            undo=CancelShipment(order_id=ORDER),
            outcome=OrderShipped(order_id=ORDER, shipment_id="sh-1"),
            no=ShipmentRefused(order_id=ORDER, reason="gone"),
        ),
    ],
    good_end=OrderCompleted(order_id=ORDER),
    bad_end=OrderCancelled(order_id=ORDER, reason=""),
)
STORIES = [SIGN_UP, PLACE_ORDER]
CASES = [pytest.param(story, part, id=f"{part.step}") for story in STORIES for part in story.parts]
each_saga = pytest.mark.parametrize("story", STORIES, ids=lambda story: story.saga.__name__)
each_step = pytest.mark.parametrize(("story", "part"), CASES)


@each_saga
def test_the_full_way_sends_each_command_and_announces_the_good_end(story: Story) -> None:
    run = story.run()
    for part in story.parts:
        assert run.status is Status.RUNNING
        assert run.sent == [part.do]
        run.succeeds(part.outcome)
    assert run.status is Status.COMPLETED
    assert run.published == [story.good_end]
    assert run.sent == []


@each_saga
def test_an_instance_is_found_by_what_the_business_calls_it(story: Story) -> None:
    run = story.run()
    assert run.instance.key == str(USER if story is SIGN_UP else ORDER)
    assert run.instance.version == 1


@each_step
def test_a_declined_step_undoes_those_before_it_in_reverse(story: Story, part: Part) -> None:
    run = story.run_to(part.step)
    run.declines(part.no or "gone")
    assert story.undo_all(run) == story.undos_before(part.step, inclusive=False)
    assert run.status is Status.COMPENSATED
    assert run.published == [story.withdrawn(f"{part.step} declined: gone")]


@each_step
@pytest.mark.parametrize(
    ("happens", "reason"),
    [(Run.fails, "failed: failed: out of order"), (Run.gives_no_answer, "gave no answer in time")],
    ids=["failed", "no answer"],
)
def test_a_step_that_may_have_happened_is_undone_first(
    story: Story, part: Part, happens: Callable[[Run], object], reason: str
) -> None:
    run = story.run_to(part.step)
    happens(run)
    assert story.undo_all(run) == story.undos_before(part.step, inclusive=True)
    assert run.status is Status.COMPENSATED
    assert run.published == [story.withdrawn(f"{part.step} {reason}")]


@each_step
def test_a_compensation_that_fails_asks_for_a_person_after_the_others(story: Story, part: Part) -> None:
    """Nothing is announced: what the bad end says would not be true."""
    last = story.parts[-1]
    run = story.run_to(last.step)
    run.fails()
    left = story.undos_before(last.step, inclusive=True)
    while run.status is Status.COMPENSATING:
        assert run.sent == [left.pop(0)]
        run = run.fails() if run.sent == [part.undo] else run.succeeds()
    assert left == []
    if part.undo is None:
        assert run.status is Status.COMPENSATED
        return
    assert run.status is Status.NEEDS_ATTENTION
    assert run.instance.steps[part.step].status is StepStatus.UNDO_FAILED
    assert run.published == []


@each_saga
def test_a_long_reason_fits_into_the_announcement(story: Story) -> None:
    run = story.run()
    run.declines("x" * 5000)
    [end] = run.published
    assert len(end.model_dump()["reason"]) == 500
    assert run.status is Status.COMPENSATED


def test_an_order_remembers_its_charge_and_its_shipment() -> None:
    run = PLACE_ORDER.run()
    assert (run.instance.state["charge_id"], run.instance.state["shipment_id"]) == (None, None)
    for part in PLACE_ORDER.parts:
        run.succeeds(part.outcome)
    assert (run.instance.state["charge_id"], run.instance.state["shipment_id"]) == ("ch-1", "sh-1")


def test_a_charge_that_is_known_too_late_is_given_back() -> None:
    run = PLACE_ORDER.run_to("charge")
    run.gives_no_answer()
    assert PLACE_ORDER.undo_all(run) == [RefundCard(order_id=ORDER), ReleaseStock(order_id=ORDER)]
    run.done("charge", Result.SUCCEEDED, PLACE_ORDER.parts[1].outcome)
    assert run.status is Status.COMPENSATING
    assert run.sent == [RefundCard(order_id=ORDER)]
    assert run.instance.state["charge_id"] == "ch-1"


@each_saga
def test_the_chart_shows_every_step_every_compensation_and_how_it_ends(story: Story) -> None:
    chart = mermaid(story.saga.definition)
    names = [f"do_{part.step}" for part in story.parts]
    for before, name in zip(["started", *names], [*names, "completed"], strict=True):
        assert f"    {before} --> {name}\n" in chart
    for part, step in zip(story.parts, story.saga.definition.steps, strict=True):
        assert f'    do_{part.step}["{part.step}<br/>within 1 min' in chart
        assert (f"undo_{part.step}" in chart) is (part.undo is not None)
        assert step.undo is None or f'    undo_{part.step}[/"{step.undo.name}<br/>within 1 min' in chart
    assert story.start.message_type in chart
    assert "--> completed" in chart
    assert "-.-> compensated" in chart


@each_saga
def test_the_chart_of_an_instance_says_where_each_step_stands(story: Story) -> None:
    first, second, *_ = story.parts
    run = story.run_to(second.step)
    run.declines("gone")
    chart = mermaid(story.saga.definition, run.instance)
    assert f'do_{first.step}["{first.step}<br/>undoing"]' in chart
    assert f"class do_{second.step} failed" in chart
    assert f"class undo_{first.step} running" in chart
    story.undo_all(run)
    assert f"class undo_{first.step} done" in mermaid(story.saga.definition, run.instance)


# The application


@each_saga
def test_the_application_handles_every_command_that_its_sagas_send(story: Story) -> None:
    handled = {handler.message for handler in app.handlers}
    sent = {type(command) for part in story.parts for command in (part.do, part.undo) if command is not None}
    assert sent <= handled


@each_saga
def test_what_a_saga_wants_to_know_is_what_the_handler_returns(story: Story) -> None:
    handlers = {handler.message: handler for handler in app.handlers}
    for part, step in zip(story.parts, story.saga.definition.steps, strict=True):
        if step.on_succeeded is not None:
            returned = get_type_hints(handlers[type(part.do)].function)["return"]
            assert step.on_succeeded.outcome in (returned, *get_args(returned))
