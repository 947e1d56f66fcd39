"""Secrets are masked where people look at messages."""

import pytest

from coordinator.redaction import is_secret, redacted, redacted_text


@pytest.mark.parametrize(
    "name",
    ["password", "db_password", "userPassword", "API-Key", "apiKey", "card_number", "X-Auth-Token", "cvv", "PIN"],
)
def test_the_name_of_a_secret_is_known_however_it_is_written(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize("name", ["order", "pinned", "key", "card", "number", "tokenizer", "shipping", "reason", ""])
def test_other_names_are_not_taken_for_secrets(name: str) -> None:
    assert not is_secret(name)


def test_secrets_in_a_document_are_masked_at_any_depth_and_all_else_stays() -> None:
    document = {"order": "1", "card": {"card_number": 4111, "holder": "Ada"}, "tries": [{"token": ["a"]}], "pin": None}
    assert redacted(document) == {
        "order": "1",
        "card": {"card_number": "***", "holder": "Ada"},
        "tries": [{"token": "***"}],
        "pin": None,
    }
    assert redacted(["https://ada:secret@bank/x"]) == ["https://ada:***@bank/x"]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("cannot connect to amqp://ada:pass:word@host/x", "cannot connect to amqp://ada:***@host/x"),
        ("refused: token=abc, order=1", "refused: token=***, order=1"),
        ("{'password': 'a b', 'order': '1'}", "{'password': ***, 'order': '1'}"),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ('{"api_key":"x"}', '{"api_key":***}'),
        ("ValueError: no refund for order 7", "ValueError: no refund for order 7"),
    ],
)
def test_secrets_in_the_text_of_an_error_are_masked(text: str, masked: str) -> None:
    assert redacted_text(text) == masked


@pytest.mark.parametrize("piece", ["a-", "password", "x:", "://", "'", "=\t"])
def test_no_text_makes_the_masking_slow(piece: str) -> None:
    assert redacted_text(piece * 100_000)
