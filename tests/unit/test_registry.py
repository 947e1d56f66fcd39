"""Which classes read which messages, and what is said about messages that cannot be read."""

from datetime import date
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address
from typing import Annotated, Literal
from uuid import UUID

import pytest
from pydantic import BaseModel, Field

from events.envelope import Envelope
from events.errors import DefinitionError, InvalidMessageError, NewerVersionError, UnknownTypeError
from events.message import Data, Event, upcast
from events.registry import Registry

SECRET = "4711-secret"


class Placed(Event, version=3):
    order: str

    @upcast(from_version=1)
    def _rename(data: Data) -> Data:  # noqa: N805  # a function in a class, no method
        return {"order": data["id"]}


class Cancelled(Event, version=2):
    order: int

    @upcast(from_version=1)
    def _parse(data: Data) -> Data:  # noqa: N805  # as above
        return {"order": int(data["order"])}


def envelope(kind: str = "placed", version: int = 3, data: bytes = b'{"order":"7"}') -> Envelope:
    return Envelope(id="1", source="/s", type=kind, version=version, data=data)


@pytest.fixture
def registry() -> Registry:
    return Registry([Placed, Cancelled])


def test_a_message_is_read_by_the_class_of_its_type(registry: Registry) -> None:
    assert registry.read(envelope()) == Placed(order="7")
    assert registry.read(envelope("cancelled", 1, b'{"order":"7"}')) == Cancelled(order=7)


def test_a_class_may_be_added_twice(registry: Registry) -> None:
    registry.add(Placed)
    assert list(registry) == [Placed, Cancelled]


def test_two_classes_of_one_type_are_refused_by_name(registry: Registry) -> None:
    class Other(Event, type="placed"):
        pass

    with pytest.raises(DefinitionError, match=r"Other and .*Placed both have the type 'placed'; give one"):
        registry.add(Other)


def test_an_unknown_type_is_refused_and_never_imported(registry: Registry) -> None:
    for kind in ("os.system", "tests.unit.test_registry.Placed", "Placed", "placed ", ""):
        with pytest.raises(UnknownTypeError, match="nobody here knows the type"):
            registry.read(envelope(kind))


def test_a_newer_version_is_refused(registry: Registry) -> None:
    with pytest.raises(NewerVersionError, match="placed has version 4, this code knows up to 3"):
        registry.read(envelope(version=4))


def test_a_missing_upcaster_is_named(registry: Registry) -> None:
    with pytest.raises(InvalidMessageError, match="placed: no upcaster from version 2"):
        registry.read(envelope(version=1, data=b'{"id":"7"}'))


def test_an_upcaster_that_raises_spoils_its_message_only_and_its_text_is_not_repeated(registry: Registry) -> None:
    with pytest.raises(InvalidMessageError, match="cancelled: an upcaster raised ValueError") as caught:
        registry.read(envelope("cancelled", 1, b'{"order":"%b"}' % SECRET.encode()))
    assert SECRET not in str(caught.value)


def test_an_upcaster_that_misses_a_field_is_not_taken_for_a_missing_upcaster(registry: Registry) -> None:
    with pytest.raises(InvalidMessageError, match="cancelled: an upcaster raised KeyError"):
        registry.read(envelope("cancelled", 1, b"{}"))


class Card(BaseModel):
    kind: Literal["card"]


class Cash(BaseModel):
    kind: Literal["cash"]


class Color(Enum):
    RED = "red"


class Everything(Event):
    """One field of each kind whose texts by pydantic could repeat the input."""

    number: int = 0
    ratio: float = 0
    price: Decimal = Decimal(0)
    day: date = date(2026, 1, 1)
    key: UUID = UUID(int=0)
    color: Color = Color.RED
    word: Literal["a"] = "a"
    code: Annotated[str, Field(pattern="^[0-9]$")] = "1"
    short: Annotated[str, Field(max_length=3)] = ""
    address: IPv4Address = IPv4Address(0)
    payment: Annotated[Card | Cash, Field(discriminator="kind")] = Card(kind="card")
    flag: bool = False
    nested: Card = Card(kind="card")


@pytest.mark.parametrize("field", [name for name in Everything.model_fields if name not in {"payment", "nested"}])
def test_an_invalid_field_is_named_without_its_value(field: str) -> None:
    with pytest.raises(InvalidMessageError, match=f"Everything: {field}: ") as caught:
        Registry([Everything]).read(envelope("everything", 1, b'{"%b":"%b"}' % (field.encode(), SECRET.encode())))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("field", ["payment", "nested"])
def test_an_invalid_model_inside_is_named_without_its_value(field: str) -> None:
    data = b'{"%b":{"kind":"%b"}}' % (field.encode(), SECRET.encode())
    with pytest.raises(InvalidMessageError, match=f"Everything: {field}") as caught:
        Registry([Everything]).read(envelope("everything", 1, data))
    assert SECRET not in str(caught.value)


def test_data_that_is_no_object_is_refused() -> None:
    with pytest.raises(InvalidMessageError, match="Placed: data: "):
        Registry([Placed]).read(envelope(data=b"[]"))


def test_the_text_of_many_errors_has_an_end() -> None:
    class Many(Event):
        numbers: list[int]

    data = b'{"numbers":[' + b",".join([b'"x"'] * 10_000) + b"]}"
    with pytest.raises(InvalidMessageError) as caught:
        Registry([Many]).read(envelope("many", 1, data))
    assert len(str(caught.value)) <= 2000
