"""What a message class is, and how data of older versions becomes data of today."""

from typing import Any

import pytest
from pydantic import ValidationError

from events.errors import DefinitionError, InvalidMessageError
from events.message import (
    DEFAULT_BUNDLE,
    Command,
    Data,
    Event,
    Failed,
    Message,
    Refused,
    Reply,
    Succeeded,
    dotted,
    upcast,
)


class UserRegistered(Event):
    name: str
    score: float = 0.0


class Renamed(Event, type="user.renamed", version=3, bundle=1):
    full_name: str
    active: bool

    @upcast(from_version=1)
    def _join_names(data: Data) -> Data:  # noqa: N805  # a function in a class, no method
        return {"full_name": f"{data.pop('first')} {data.pop('last')}", **data}

    @upcast(from_version=2)
    def _everybody_is_active(data: Data) -> Data:  # noqa: N805  # as above
        return {**data, "active": True}


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("UserRegistered", "user.registered"),
        ("User", "user"),
        ("HTTPRequestFailed", "http.request.failed"),
        ("ChargeCard2", "charge.card2"),
        ("PDF", "pdf"),
        ("charge_card", "charge_card"),
        ("OrderV2Placed", "order.v2.placed"),
    ],
)
def test_a_class_name_becomes_dotted_lower_case(class_name: str, name: str) -> None:
    assert dotted(class_name) == name


def test_the_type_defaults_to_the_class_name() -> None:
    assert (UserRegistered.message_type, UserRegistered.message_version) == ("user.registered", 1)
    assert UserRegistered.bundle_limit == DEFAULT_BUNDLE


def test_type_version_and_bundle_are_class_arguments() -> None:
    assert (Renamed.message_type, Renamed.message_version, Renamed.bundle_limit) == ("user.renamed", 3, 1)


def test_a_subclass_is_a_message_of_its_own() -> None:
    class RenamedTwice(Renamed):
        pass

    assert (RenamedTwice.message_type, RenamedTwice.message_version) == ("renamed.twice", 1)
    assert RenamedTwice.upcasters == {}


def test_the_base_classes_have_no_place_of_their_own_in_data() -> None:
    assert UserRegistered(name="a").to_data() == b'{"name":"a","score":0.0}'
    assert set(Renamed.model_fields) == {"full_name", "active"}


def test_the_replies_that_are_built_in_have_names() -> None:
    kinds: list[type[Reply]] = [Succeeded, Refused, Failed]
    assert [kind.message_type for kind in kinds] == ["succeeded", "refused", "failed"]


def test_a_message_is_frozen() -> None:
    message = UserRegistered(name="a")
    with pytest.raises(ValidationError, match="frozen"):
        message.name = "b"  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_json_does_not_have_are_refused(number: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        UserRegistered(name="a", score=number)


def test_unknown_fields_are_ignored() -> None:
    assert UserRegistered.from_data(b'{"name":"a","color":"red"}', 1) == UserRegistered(name="a")


# Versions


def test_data_of_the_newest_version_is_read_as_it_is() -> None:
    assert Renamed.from_data(b'{"full_name":"A B","active":false}', 3) == Renamed(full_name="A B", active=False)


def test_data_of_an_old_version_goes_through_all_upcasters_after_it() -> None:
    expected = Renamed(full_name="A B", active=True)
    assert Renamed.from_data(b'{"first":"A","last":"B"}', 1) == expected
    assert Renamed.from_data(b'{"full_name":"A B"}', 2) == expected


def test_what_an_upcaster_returns_is_validated() -> None:
    with pytest.raises(ValidationError, match="full_name"):
        Renamed.from_data(b'{"full_name":1}', 2)


def test_upcasters_can_be_called_alone() -> None:
    assert Renamed.upcasters[1]({"first": "A", "last": "B"}) == {"full_name": "A B"}


def test_a_missing_upcaster_is_named() -> None:
    class Gap(Event, version=3):
        @upcast(from_version=1)
        def _first(data: Data) -> Data:  # noqa: N805  # as above
            return data

    with pytest.raises(InvalidMessageError, match="gap: no upcaster from version 2"):
        Gap.from_data(b"{}", 1)


def test_an_error_in_an_upcaster_is_not_taken_for_a_missing_one() -> None:
    with pytest.raises(KeyError, match="first"):
        Renamed.from_data(b"{}", 1)


# Bad definitions


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"type": "User Registered"}, "must be dotted lower case"),
        ({"type": "user..registered"}, "must be dotted lower case"),
        ({"type": ".user"}, "must be dotted lower case"),
        ({"type": "user.#"}, "must be dotted lower case"),
        ({"type": "user.registered\n"}, "must be dotted lower case"),
        ({"type": "größe"}, "must be dotted lower case"),
        ({"type": "a" * 201}, "200 at most"),
        ({"version": 0}, "versions count from 1, not 0"),
        ({"version": -1}, "versions count from 1, not -1"),
        ({"bundle": 0}, "bundle counts from 1"),
        ({"bundle": 40_000}, "bundle counts from 1 to 32767, not 40000"),
    ],
)
def test_a_bad_definition_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(DefinitionError, match=f"Bad: .*{text}"):
        type("Bad", (Event,), {"__module__": __name__}, **arguments)


def test_a_name_that_is_no_type_is_refused() -> None:
    with pytest.raises(DefinitionError, match="Größe: type 'gr"):
        type("Größe", (Event,), {"__module__": __name__})


@pytest.mark.parametrize("number", [0, 2, 3, -1])
def test_an_upcaster_that_leads_nowhere_is_refused(number: int) -> None:
    with pytest.raises(DefinitionError, match="lead to no version below 2"):

        class Bad(Event, version=2):
            @upcast(from_version=number)
            def _up(data: Data) -> Data:  # noqa: N805  # as above
                return data


def test_two_upcasters_from_one_version_are_refused() -> None:
    with pytest.raises(DefinitionError, match="Bad: two upcasters from one version"):

        class Bad(Event, version=2):
            @upcast(from_version=1)
            def _one(data: Data) -> Data:  # noqa: N805  # as above
                return data

            @upcast(from_version=1)
            def _other(data: Data) -> Data:  # noqa: N805  # as above
                return data


def test_events_commands_and_replies_are_told_apart() -> None:
    class Order(Command):
        pass

    assert issubclass(Order, Message)
    assert not issubclass(Order, Event | Reply)
