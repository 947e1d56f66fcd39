"""The stand-ins of the demonstration, over real sockets: one effect a key, refusals by data, a durable journal."""

import asyncio
import json
from collections.abc import AsyncIterator
from email.message import EmailMessage
from pathlib import Path

import aiosmtplib
import httpx2
import pytest

from coordinator.demo.generate import ORDERS, SIGN_UPS, make_events
from coordinator.demo.journal import Journal
from coordinator.demo.run import EVENTS
from coordinator.demo.services import running_services
from events.errors import ConfigurationError
from handlers.catalog.resources import ThirdParties

Services = tuple[ThirdParties, Journal]
CHARGE = {"order_id": "o1", "amount": 1990, "currency": "EUR", "card": "good"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


@pytest.fixture
async def services(path: Path) -> AsyncIterator[Services]:
    async with running_services(path) as running:
        yield running


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(trust_env=False) as client:
        yield client


async def post(http: httpx2.AsyncClient, url: str, body: object, key: str = "k1") -> httpx2.Response:
    return await http.post(url, json=body, headers={"Idempotency-Key": key})


def mail(recipient: str, key: str = "m1", subject: str = "Welcome") -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "shop@example.com", recipient, subject
    message["Message-ID"] = f"<{key}@example.com>"
    message.set_content("Hello")
    return message


async def send(parties: ThirdParties, message: EmailMessage) -> None:
    await aiosmtplib.send(message, hostname=parties.smtp_host, port=parties.smtp_port, timeout=10)


# Payments


async def test_a_repeated_charge_gets_the_same_answer_and_is_noted_as_a_repeat(
    services: Services, http: httpx2.AsyncClient
) -> None:
    parties, journal = services
    first = await post(http, f"{parties.payments_url}/charges", CHARGE)
    again = await post(http, f"{parties.payments_url}/charges", CHARGE)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json() != {}
    assert journal.counts() == {"charge": 1}
    assert journal.repeats == 1


async def test_what_was_charged_is_refunded_once(services: Services, http: httpx2.AsyncClient) -> None:
    parties, journal = services
    await post(http, f"{parties.payments_url}/charges", CHARGE)
    for _ in range(2):
        answer = await post(http, f"{parties.payments_url}/refunds", {"order_id": "o1"}, "r1")
        assert answer.status_code == 201
    refund = journal.find("r1")
    assert refund is not None
    assert (refund["of"], refund["amount"], refund["currency"]) == ("o1", 1990, "EUR")
    assert journal.counts() == {"charge": 1, "refund": 1}


async def test_what_was_never_charged_is_not_refunded(services: Services, http: httpx2.AsyncClient) -> None:
    parties, journal = services
    answer = await post(http, f"{parties.payments_url}/refunds", {"order_id": "o1"})
    assert answer.status_code == 404
    assert journal.counts() == {}


async def test_a_vanishing_answer_leaves_a_charge_behind(services: Services, http: httpx2.AsyncClient) -> None:
    parties, journal = services
    for _ in range(2):
        answer = await post(http, f"{parties.payments_url}/charges", {**CHARGE, "card": "vanishing"})
        assert answer.status_code == 503
    assert journal.counts() == {"charge": 1}


# Refusals and failures by data


@pytest.mark.parametrize(
    ("service", "body", "status"),
    [
        ("/payments/charges", {**CHARGE, "card": "declined"}, 402),
        ("/mailing-list/members", {"email": "a@unwanted.example"}, 403),
        ("/webhook", {"text": "New account: Spam Bot"}, 403),
        ("/shipping/shipments", {"order_id": "o1", "address": "1 Nowhere Lane"}, 422),
        ("/payments/charges", {**CHARGE, "card": "broken"}, 503),
        ("/mailing-list/members", {"email": "a@broken.example"}, 503),
        ("/webhook", {"text": "New account: Broken Bob"}, 503),
        ("/shipping/shipments", {"order_id": "o1", "address": "7 Flood Plain"}, 503),
    ],
)
async def test_a_refusal_or_failure_has_no_effect_however_often_it_is_asked(
    services: Services, http: httpx2.AsyncClient, service: str, body: dict[str, object], status: int
) -> None:
    parties, journal = services
    base = parties.payments_url.removesuffix("/payments")
    for _ in range(4):
        assert (await post(http, base + service, body)).status_code == status
    assert journal.counts() == {}


@pytest.mark.parametrize(
    ("service", "body", "status"),
    [
        ("/payments/charges", {**CHARGE, "card": "flaky"}, 201),
        ("/mailing-list/members", {"email": "a@flaky.example"}, 201),
        ("/webhook", {"text": "New account: Flaky Fiona"}, 200),
        ("/shipping/shipments", {"order_id": "o1", "address": "3 Fog Hill"}, 201),
    ],
)
async def test_a_flaky_service_fails_twice_for_each_key_and_then_works(
    services: Services, http: httpx2.AsyncClient, service: str, body: dict[str, object], status: int
) -> None:
    parties, journal = services
    base = parties.payments_url.removesuffix("/payments")
    for key in ("k1", "k2"):
        assert [(await post(http, base + service, body, key)).status_code for _ in range(4)] == [
            503,
            503,
            *[status] * 2,
        ]
    assert sum(journal.counts().values()) == 2
    assert journal.repeats == 2


# Removing


@pytest.mark.parametrize(
    ("collection", "body", "name", "counts"),
    [
        (
            "/mailing-list/members",
            {"email": "a+b@example.com"},
            "a%2Bb%40example.com",
            {"subscription": 1, "unsubscription": 1},
        ),
        (
            "/shipping/shipments",
            {"order_id": "o1", "address": "1 High Street"},
            "o1",
            {"cancellation": 1, "shipment": 1},
        ),
    ],
)
async def test_what_is_there_is_removed_once(
    services: Services, http: httpx2.AsyncClient, collection: str, body: object, name: str, counts: dict[str, int]
) -> None:
    parties, journal = services
    url = parties.payments_url.removesuffix("/payments") + collection
    assert (await http.delete(f"{url}/{name}")).status_code == 404
    await post(http, url, body)
    assert [(await http.delete(f"{url}/{name}")).status_code for _ in range(2)] == [204, 204]
    assert journal.counts() == counts


# HTTP


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"text": "x"}', {}, 400),
        (b"{}", {"Idempotency-Key": "k"}, 400),
        (b"not json", {"Idempotency-Key": "k"}, 400),
        (b"[]", {"Idempotency-Key": "k"}, 400),
    ],
    ids=["no key", "no text", "no JSON", "no object"],
)
async def test_a_request_that_cannot_be_read_is_refused(
    services: Services, http: httpx2.AsyncClient, body: bytes, headers: dict[str, str], status: int
) -> None:
    parties, journal = services
    answer = await http.post(parties.webhook_url, content=body, headers=headers)
    assert answer.status_code == status
    assert answer.json()["reason"]
    assert journal.counts() == {}
    assert (await post(http, parties.webhook_url, {"text": "x"})).status_code == 200


async def test_an_unknown_service_is_not_found(services: Services, http: httpx2.AsyncClient) -> None:
    assert (await post(http, f"{services[0].webhook_url}/elsewhere", {"text": "x"})).status_code == 404


async def test_a_connection_that_is_kept_alive_does_not_keep_the_services_from_ending(
    path: Path, http: httpx2.AsyncClient
) -> None:
    async with running_services(path) as (parties, _):
        await post(http, parties.webhook_url, {"text": "x"})
        _, mail_connection = await asyncio.open_connection(parties.smtp_host, parties.smtp_port)
    mail_connection.close()
    await mail_connection.wait_closed()
    with pytest.raises(httpx2.HTTPError):
        await post(http, parties.webhook_url, {"text": "x"})


# E-mail


async def test_an_email_is_told_from_another_by_its_message_id(services: Services) -> None:
    parties, journal = services
    for key in ("m1", "m1", "m2"):
        await send(parties, mail("ada@example.com", key))
    assert journal.counts() == {"e-mail": 2}
    assert journal.repeats == 1
    effect = journal.find("<m1@example.com>")
    assert effect is not None
    assert (effect["of"], effect["subject"]) == ("ada@example.com", "Welcome")


async def test_a_message_id_that_is_folded_is_still_read(services: Services) -> None:
    """The email package folds a long one onto a line of its own."""
    parties, journal = services
    key = "x" * 120
    await send(parties, mail("ada@example.com", key))
    assert journal.find(f"<{key}@example.com>") is not None


async def test_a_mailbox_that_does_not_exist_is_refused_with_550(services: Services) -> None:
    parties, journal = services
    with pytest.raises(aiosmtplib.SMTPRecipientsRefused) as refused:
        await send(parties, mail("ada@nowhere.example"))
    assert [each.code for each in refused.value.recipients] == [550]
    assert journal.counts() == {}


async def test_a_busy_mail_server_takes_an_email_at_the_third_try(services: Services) -> None:
    parties, journal = services
    for _ in range(2):
        with pytest.raises(aiosmtplib.SMTPDataError, match="busy"):
            await send(parties, mail("ada@busy.example"))
    await send(parties, mail("ada@busy.example"))
    assert journal.counts() == {"e-mail": 1}


async def test_a_moody_mail_server_takes_refusals_and_never_a_welcome(services: Services) -> None:
    parties, journal = services
    for _ in range(3):
        with pytest.raises(aiosmtplib.SMTPDataError, match="mood"):
            await send(parties, mail("ada@moody.example"))
    await send(parties, mail("ada@moody.example", "m2", "Your account"))
    assert journal.counts() == {"e-mail": 1}


# The journal


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def tear(path: Path) -> None:
    """What is left of a line when the process is killed while writing it."""
    with path.open("ab") as file:
        file.write(b'{"key": "k3", "what": "char')


async def test_a_service_that_was_killed_knows_its_keys_again(path: Path, http: httpx2.AsyncClient) -> None:
    """The line that was being written when the process died is dropped; nobody has been told of it."""
    async with running_services(path) as (parties, _):
        first = await post(http, f"{parties.payments_url}/charges", CHARGE)
        await post(http, f"{parties.payments_url}/charges", {**CHARGE, "order_id": "o2", "card": "flaky"}, "k2")
    whole = lines_of(path)
    tear(path)
    async with running_services(path) as (parties, journal):
        assert lines_of(path) == whole
        again = await post(http, f"{parties.payments_url}/charges", CHARGE)
        assert again.json() == first.json()
        assert (journal.counts(), journal.repeats, journal.attempts("k2")) == ({"charge": 1}, 1, 1)
    assert lines_of(path) == [*whole, b'{"repeat": "k1"}\n']


def test_a_journal_has_one_writer(path: Path) -> None:
    """A second process would take the line that the first is writing for one that was cut off, and drop it."""
    first = Journal(path)
    first.once("k1", "charge", of="o1")
    tear(path)
    half_written = lines_of(path)
    with pytest.raises(ConfigurationError, match="is running"):
        Journal(path)
    assert lines_of(path) == half_written
    first.close()
    Journal(path).close()


@pytest.mark.parametrize("line", [b"hello\n", b"[]\n", b"{}\n"])
def test_a_file_that_is_no_journal_is_left_alone(path: Path, line: bytes) -> None:
    path.write_bytes(line)
    with pytest.raises(ConfigurationError, match="line 1"):
        Journal(path)
    assert path.read_bytes() == line


# The events


def test_the_file_of_events_is_what_the_generator_makes() -> None:
    assert [json.loads(line) for line in EVENTS.read_text().splitlines()] == list(make_events())


def test_the_events_are_many_unique_and_of_two_versions() -> None:
    events = list(make_events())
    assert len({event["id"] for event in events}) == len(events) == SIGN_UPS + ORDERS
    keys = {event["data"].get("user_id") or event["data"]["order_id"] for event in events}
    assert len(keys) == len(events)
    schemas = [event["dataschema"] for event in events if event["type"] == "user.registered"]
    old, new = (schemas.count(f"urn:schema:user.registered:{version}") for version in (1, 2))
    assert old + new == SIGN_UPS >= 24
    assert 0 < old < new
    assert ORDERS >= 48
