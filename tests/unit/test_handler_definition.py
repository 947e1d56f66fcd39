"""What a handler is: found in its signature, and refused where it cannot work."""

from collections.abc import Callable
from typing import Annotated, Any

import pytest
from dishka import FromComponent
from sqlalchemy.ext.asyncio import AsyncSession

from events.bus import Address, Exchange
from events.errors import DefinitionError
from events.message import Command, Event, Reply
from handlers import Context, Declined, Retry, handles


class ChargeCard(Command):
    order: str


class OrderPlaced(Event):
    order: str


class Charged(Reply):
    charge: str


class Payments:
    pass


def test_a_handler_is_named_after_its_function_and_has_a_queue_of_its_own() -> None:
    @handles(ChargeCard)
    async def charge_card(command: ChargeCard) -> None: ...

    @handles(OrderPlaced, name="greet_customer")
    async def greet(event: OrderPlaced) -> None: ...

    assert charge_card.name == "charge_card"
    assert charge_card.queue.name == "handler.charge_card"
    assert charge_card.queue.bindings == (Address(Exchange.COMMANDS, "charge.card"),)
    assert greet.queue.name == "handler.greet_customer"
    assert greet.queue.bindings == (Address(Exchange.EVENTS, "order.placed"),)


def test_parameters_are_told_apart_by_their_annotations() -> None:
    @handles(ChargeCard)
    async def charge_card(
        payments: Payments,
        session: AsyncSession,
        what: ChargeCard,
        around: Context,
        mail: Annotated[str, FromComponent("mail")],
    ) -> None: ...

    assert charge_card.message_parameter == "what"
    assert charge_card.context_parameter == "around"
    assert charge_card.session_parameter == "session"
    assert charge_card.resources == (("payments", Payments), ("mail", Annotated[str, FromComponent("mail")]))


def test_only_the_message_is_needed() -> None:
    @handles(ChargeCard)
    async def charge_card(command: ChargeCard) -> None: ...

    assert charge_card.context_parameter is None
    assert charge_card.session_parameter is None
    assert charge_card.resources == ()
    assert (charge_card.retry, charge_card.timeout, charge_card.concurrency) == (Retry(), 30.0, 16)


def _no_coroutine(command: ChargeCard) -> None: ...


async def _no_message(context: Context) -> None: ...


async def _no_annotation(command: ChargeCard, context) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001  # that is the point


async def _two_messages(command: ChargeCard, other: ChargeCard) -> None: ...


async def _other_message(command: OrderPlaced) -> None: ...


async def good(command: ChargeCard) -> None: ...


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        (_no_coroutine, {"name": "bad"}, "handler bad: write `async def`"),
        (_no_message, {"name": "bad"}, "handler bad: no parameter is annotated with ChargeCard"),
        (_other_message, {"name": "bad"}, "handler bad: no parameter is annotated with ChargeCard"),
        (_no_annotation, {"name": "bad"}, "handler bad: annotate the parameter `context`"),
        (_two_messages, {"name": "bad"}, "handler bad: two parameters of type ChargeCard"),
        (good, {"name": "Bad"}, "handler 'Bad': a name is lower case"),
        (good, {"name": "b.d"}, "handler 'b.d': a name is lower case"),
        (good, {"name": "b" * 101}, "a name is lower case"),
        (good, {"name": "coordinator"}, "the coordinator and the bus keep their dead letters under it"),
        (good, {"name": "bus"}, "the coordinator and the bus keep their dead letters under it"),
        (good, {"timeout": 0}, "handler good: timeout must be positive"),
        (good, {"timeout": -1}, "handler good: timeout must be positive"),
        (good, {"concurrency": 0}, "handler good: .*concurrency at least 1"),
    ],
)
def test_what_cannot_work_is_refused(function: Callable[..., Any], arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(DefinitionError, match=text):
        handles(ChargeCard, **arguments)(function)


def test_a_reply_has_no_handler() -> None:
    with pytest.raises(DefinitionError, match="Charged is neither an Event nor a Command"):
        handles(Charged)(good)  # type: ignore[arg-type]  # that is the point


def test_a_decline_in_words_is_a_reply_and_a_message_is_kept() -> None:
    refused = Declined("no money")
    assert refused.outcome.to_data() == b'{"reason":"no money"}'
    assert str(refused) == "no money"
    said = OrderPlaced(order="1")
    assert Declined(said).outcome is said
