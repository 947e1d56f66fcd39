"""The shipped handlers against servers on this machine: SMTP, HTTP, and both databases where they use SQL."""

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from aiosmtpd.smtp import SMTP
from aiosmtpd.smtp import Envelope as MailEnvelope
from dishka import AsyncContainer, Provider, Scope, make_async_container
from sqlalchemy import select, text

from coordinator.process import log_to_stderr
from events.catalog.orders import CancelShipment, OrderShipped, ReleaseStock, ReserveStock, ShipmentRefused, ShipOrder
from events.catalog.payments import ChargeCard, PaymentCaptured, PaymentFailed, PaymentRefunded, RefundCard
from events.catalog.users import (
    CreateDefaultSettings,
    NotifyAdmins,
    RemoveSettings,
    SendRefusalEmail,
    SendWelcomeEmail,
    SubscribeToMailingList,
    UnsubscribeFromMailingList,
)
from events.catalog.values import Money
from events.database import open_database, transaction
from events.derive import derive_id
from events.envelope import Direction, Envelope, Result, SagaLink
from events.failpoints import armed
from events.message import Command, Message, Refused
from handlers import Context, Declined, Handler, Retry
from handlers.catalog import all_handlers
from handlers.catalog.resources import Http, ThirdParties, ThirdPartyError, ThirdPartyProvider
from handlers.catalog.settings import DEFAULTS
from handlers.catalog.tables import metadata, stock_item, stock_reservation, user_setting
from tests.support.base import free_port
from tests.support.flows import PATIENCE, Stage, enveloped, open_stage, until

USER = UUID("01900000-0000-7000-8000-00000000000a")
ORDER = UUID("01900000-0000-7000-8000-00000000000b")
KEY = "the-key"
TOTAL = Money(minor=1990, currency="EUR")
HANDLERS = {handler.message: handler for handler in all_handlers}


# Servers


@dataclass
class Asked:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Web:
    """An HTTP server that answers every request with `answer`; None means never."""

    url: str = ""
    answer: bytes | None = b""
    asked: list[Asked] = field(default_factory=list)

    def answers(self, status: int, body: object = None) -> None:
        payload = b"" if body is None else json.dumps(body).encode()
        self.answer = b"HTTP/1.1 %d Said\r\ncontent-length: %d\r\n\r\n%s" % (status, len(payload), payload)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            method, path, _ = (await reader.readline()).decode().split()
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            content = await reader.readexactly(int(headers.get("content-length", "0")))
            self.asked.append(Asked(method, path, headers, json.loads(content) if content else None))
            if self.answer is None:
                await reader.read()  # until the client has lost its patience
            else:
                writer.write(self.answer)
                await writer.drain()
        finally:
            writer.close()


@dataclass
class Mail:
    """A mail server; `on_recipient` and `on_data` are its answers, where they are not a friendly one."""

    port: int = 0
    on_recipient: str | None = None
    on_data: str | None = None
    taken: list[tuple[list[str], EmailMessage]] = field(default_factory=list)

    async def handle_RCPT(  # noqa: N802  # aiosmtpd's name
        self, _server: SMTP, _session: object, envelope: MailEnvelope, address: str, _options: list[str]
    ) -> str:
        if self.on_recipient is None:
            envelope.rcpt_tos.append(address)
        return self.on_recipient or "250 OK"

    async def handle_DATA(self, _server: SMTP, _session: object, envelope: MailEnvelope) -> str:  # noqa: N802
        if self.on_data is None:
            assert isinstance(envelope.content, bytes)
            message = message_from_bytes(envelope.content, policy=policy.default)
            assert isinstance(message, EmailMessage)
            self.taken.append((list(envelope.rcpt_tos), message))
        return self.on_data or "250 OK"


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    given = Web()
    server = await asyncio.start_server(given.serve, "127.0.0.1", 0)
    given.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield given
    server.close()
    await server.wait_closed()


@pytest.fixture
async def mail() -> AsyncIterator[Mail]:
    given = Mail()
    sessions: list[SMTP] = []

    def begin() -> SMTP:
        sessions.append(SMTP(given, hostname="localhost", enable_SMTPUTF8=True))
        return sessions[-1]

    server = await asyncio.get_running_loop().create_server(begin, "127.0.0.1", 0)
    given.port = server.sockets[0].getsockname()[1]
    yield given
    server.close()
    for session in sessions:
        if session.transport is not None:
            session.transport.close()
    await server.wait_closed()


@pytest.fixture
async def http() -> AsyncIterator[Http]:
    async with httpx2.AsyncClient(trust_env=False) as client:
        yield Http(client)


def parties_at(web: Web | None = None, mail: Mail | None = None, **about: Any) -> ThirdParties:
    url = web.url if web else f"http://127.0.0.1:{free_port()}"
    given = {
        "payments_url": f"{url}/payments",
        "mailing_list_url": f"{url}/list",
        "webhook_url": f"{url}/hook",
        "shipping_url": f"{url}/shipping",
        "smtp_port": mail.port if mail else free_port(),
    }
    return ThirdParties(**{**given, **about})


def container_of(parties: ThirdParties, http: Http) -> AsyncContainer:
    provider = Provider(scope=Scope.APP)
    provider.provide(lambda: parties, provides=ThirdParties)
    provider.provide(lambda: http, provides=Http)
    return make_async_container(provider)


async def call(command: Command, parties: ThirdParties, http: Http | None = None) -> Message | None:
    """Call the handler of `command` as the runner would, once."""
    handler = HANDLERS[type(command)]
    have: dict[Any, Any] = {ThirdParties: parties, Http: http}
    arguments = {name: have[kind] for name, kind in handler.resources}
    if handler.context_parameter:
        arguments[handler.context_parameter] = Context(message_id="m-1", idempotency_key=KEY)
    returned: Message | None = await handler.function(**{handler.message_parameter: command}, **arguments)
    return returned


# HTTP


@dataclass(frozen=True)
class Contract:
    """What a handler asks a third party, and what the answers mean."""

    command: Command
    request: tuple[str, str, Any]
    key: str | None
    good: tuple[int, Any]
    outcome: Message | None = None
    bad: tuple[int, Any] | None = None
    no: Message | None = None


SUBSCRIBE = Contract(
    SubscribeToMailingList(user_id=USER, email="ada+x@example.com"),
    ("POST", "/list/members", {"email": "ada+x@example.com"}),
    KEY,
    good=(201, {"id": "1"}),
    bad=(403, {"reason": "not you"}),
    no=Refused(reason="the mailing list refuses the address: not you"),
)
NOTIFY = Contract(
    NotifyAdmins(user_id=USER, user_name="ada", full_name="Ada"),
    ("POST", "/hook", {"text": "New account ada: Ada"}),
    KEY,
    good=(200, None),
    bad=(403, {"reason": "spam"}),
    no=Refused(reason="the administrators refuse the account: spam"),
)
CHARGE = Contract(
    ChargeCard(order_id=ORDER, amount=TOTAL, card="tok_1"),
    ("POST", "/payments/charges", {"order_id": str(ORDER), "amount": 1990, "currency": "EUR", "card": "tok_1"}),
    f"charge:{ORDER}",
    good=(201, {"id": "ch-1"}),
    outcome=PaymentCaptured(order_id=ORDER, charge_id="ch-1", amount=TOTAL),
    bad=(402, {"code": "no_money"}),
    no=PaymentFailed(order_id=ORDER, reason="no_money"),
)
SHIP = Contract(
    ShipOrder(order_id=ORDER, address="1 High Street"),
    ("POST", "/shipping/shipments", {"order_id": str(ORDER), "address": "1 High Street"}),
    f"ship:{ORDER}",
    good=(201, {"id": "sh-1"}),
    outcome=OrderShipped(order_id=ORDER, shipment_id="sh-1"),
    bad=(422, {"reason": "too far"}),
    no=ShipmentRefused(order_id=ORDER, reason="too far"),
)
REFUND = Contract(
    RefundCard(order_id=ORDER),
    ("POST", "/payments/refunds", {"order_id": str(ORDER), "charge_key": f"charge:{ORDER}"}),
    f"refund:{ORDER}",
    good=(201, {"id": "re-1"}),
    outcome=PaymentRefunded(order_id=ORDER, refund_id="re-1"),
)
UNSUBSCRIBE = Contract(
    UnsubscribeFromMailingList(user_id=USER, email="a/b?+x@example.com"),
    ("DELETE", "/list/members/a%2Fb%3F%2Bx%40example.com", None),
    None,
    good=(204, None),
)
CANCEL = Contract(
    CancelShipment(order_id=ORDER), ("DELETE", f"/shipping/shipments/{ORDER}", None), None, good=(204, None)
)
FORWARD = [SUBSCRIBE, NOTIFY, CHARGE, SHIP]
BACK = [REFUND, UNSUBSCRIBE, CANCEL]


def contracts(*given: Contract) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("contract", given, ids=lambda contract: type(contract.command).__name__)


@contracts(*FORWARD, *BACK)
async def test_a_third_party_is_asked_in_its_words_and_under_one_key(web: Web, http: Http, contract: Contract) -> None:
    """A repeat has the same key, so that it has no second effect; a DELETE names what is to be gone instead."""
    web.answers(*contract.good)
    for _ in range(2):
        assert await call(contract.command, parties_at(web), http) == contract.outcome
    assert [(each.method, each.path, each.body) for each in web.asked] == [contract.request] * 2
    assert [each.headers.get("idempotency-key") for each in web.asked] == [contract.key] * 2


@contracts(*FORWARD)
async def test_a_business_no_is_a_decline(web: Web, http: Http, contract: Contract) -> None:
    assert contract.bad is not None
    web.answers(*contract.bad)
    with pytest.raises(Declined) as declined:
        await call(contract.command, parties_at(web), http)
    assert declined.value.outcome == contract.no


@contracts(*BACK)
async def test_there_may_be_nothing_to_undo(web: Web, http: Http, contract: Contract) -> None:
    web.answers(404, {"reason": "never heard of it"})
    assert await call(contract.command, parties_at(web), http) is None


@contracts(*FORWARD, *BACK)
@pytest.mark.parametrize("status", [302, 400, 401, 409, 429, 500, 502, 503])
async def test_an_answer_that_is_neither_yes_nor_no_is_technical(
    web: Web, http: Http, contract: Contract, status: int
) -> None:
    web.answers(status, {"reason": "x", "id": "x"})
    with pytest.raises(ThirdPartyError, match=f"answered {status}"):
        await call(contract.command, parties_at(web), http)


@contracts(*FORWARD, *BACK)
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n<a>", b"SSH-2.0\r\n\r\n", None])
async def test_no_answer_or_nonsense_is_technical(contract: Contract, web: Web, answer: bytes | None) -> None:
    """The connection is closed, the answer is no JSON, it is no HTTP, it never comes."""
    web.answer = answer
    patience = httpx2.Timeout(PATIENCE, read=PATIENCE if answer is not None else 0.01)
    async with httpx2.AsyncClient(trust_env=False, timeout=patience) as client:
        with pytest.raises(ThirdPartyError, match="gave no answer: "):
            await call(contract.command, parties_at(web), Http(client))


@contracts(CHARGE)
async def test_a_third_party_that_does_not_run_is_technical(http: Http, contract: Contract) -> None:
    with pytest.raises(ThirdPartyError, match="the payment provider gave no answer: ConnectError"):
        await call(contract.command, parties_at(), http)


async def test_a_reason_of_any_length_and_shape_is_taken(web: Web, http: Http) -> None:
    for said, reason in (("x" * 9000, "x" * 500), ({"a": 1}, "{'a': 1}"), (None, "None")):
        web.answers(402, {"code": said})
        with pytest.raises(Declined) as declined:
            await call(CHARGE.command, parties_at(web), http)
        assert declined.value.outcome == PaymentFailed(order_id=ORDER, reason=reason)
    web.answers(402, ["no object"])
    with pytest.raises(Declined):
        await call(CHARGE.command, parties_at(web), http)


async def test_handlers_are_given_the_environments_third_parties_and_a_client_that_is_closed_at_the_end(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_PAYMENTS_URL", f"{web.url}/payments")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    container = make_async_container(ThirdPartyProvider())
    parties, http = await container.get(ThirdParties), await container.get(Http)
    assert await container.get(Http) is http
    web.answers(*CHARGE.good)
    assert await call(CHARGE.command, parties, http) == CHARGE.outcome
    await container.close()
    with pytest.raises(RuntimeError, match="closed"):
        await call(CHARGE.command, parties, http)


# E-mail


WELCOME = SendWelcomeEmail(user_id=USER, full_name="Ada Lövelace", email="ada@example.com")
REFUSAL = SendRefusalEmail(user_id=USER, full_name="Ada Lövelace", email="ada@example.com")


async def test_a_new_user_gets_one_email_under_the_steps_key(mail: Mail) -> None:
    await call(WELCOME, parties_at(mail=mail, sender="Shop <shop@shop.example>"))
    [(recipients, message)] = mail.taken
    assert recipients == [message["To"]] == ["ada@example.com"]
    assert (message["From"], message["Subject"]) == ("Shop <shop@shop.example>", "Welcome")
    assert message["Message-ID"] == f"<{KEY}@shop.example>"
    assert "Hello Ada Lövelace," in message.get_content()


async def test_a_message_that_is_delivered_twice_is_one_email(database_url: str, mail: Mail, http: Http) -> None:
    async with open_shop(database_url, parties_at(mail=mail), http) as shop:
        sent = asked(WELCOME)
        await shop.start(SendWelcomeEmail)
        assert (await shop.tell(sent)) == (await shop.tell(sent)) == (Result.SUCCEEDED, "succeeded", {})
        assert len(mail.taken) == 1


async def test_an_email_that_is_sent_again_after_a_crash_has_the_same_message_id(
    database_url: str, mail: Mail, http: Http
) -> None:
    """SMTP has no transaction: whoever gets it twice can tell by its id."""
    async with open_shop(database_url, parties_at(mail=mail), http) as shop:
        reached = asyncio.Event()

        async def die() -> None:
            reached.set()
            await asyncio.Event().wait()

        sent = asked(WELCOME)
        await shop.start(SendWelcomeEmail)
        with armed("handler.after_run", die):
            await shop.stage.send(sent)
            async with asyncio.timeout(PATIENCE):
                await reached.wait()
            await shop.stage.restart()
        await shop.start(SendWelcomeEmail)
        assert await shop.answer() == (Result.SUCCEEDED, "succeeded", {})
        assert sent.saga is not None
        key = derive_id(sent.saga.saga_id, "step", "do")
        assert [message["Message-ID"] for _, message in mail.taken] == [f"<{key}@example.com>"] * 2
        other = enveloped(REFUSAL, saga=replace(sent.saga, direction=Direction.UNDO))
        await shop.start(SendRefusalEmail)
        await shop.tell(other)
        assert mail.taken[2][1]["Message-ID"] != mail.taken[0][1]["Message-ID"], "to undo is another e-mail"


@pytest.mark.parametrize("answer", ["550 no such mailbox", "553 not allowed"])
async def test_a_mailbox_that_does_not_exist_declines_the_welcome_and_ends_the_refusal(mail: Mail, answer: str) -> None:
    mail.on_recipient = answer
    with pytest.raises(Declined) as declined:
        await call(WELCOME, parties_at(mail=mail))
    assert declined.value.outcome == Refused(reason="the mailbox does not exist")
    assert await call(REFUSAL, parties_at(mail=mail)) is None
    assert mail.taken == []


async def test_a_message_that_is_refused_for_good_is_declined(mail: Mail) -> None:
    mail.on_data = "554 spam"
    with pytest.raises(Declined, match="the mail server refuses the message"):
        await call(WELCOME, parties_at(mail=mail))
    await call(REFUSAL, parties_at(mail=mail))


@pytest.mark.parametrize("command", [WELCOME, REFUSAL], ids=["welcome", "refusal"])
@pytest.mark.parametrize(
    ("on_recipient", "on_data", "says"),
    [
        ("450 greylisted", None, "does not take the message now"),
        ("452 too much", None, "does not take the message now"),
        ("421 going down", None, "does not take the message now"),
        (None, "451 later", "does not take the message now"),
    ],
)
async def test_a_mail_server_that_puts_off_is_technical(
    mail: Mail, command: Command, on_recipient: str | None, on_data: str | None, says: str
) -> None:
    mail.on_recipient, mail.on_data = on_recipient, on_data
    with pytest.raises(ThirdPartyError, match=says):
        await call(command, parties_at(mail=mail))
    assert mail.taken == []


async def test_a_mail_server_that_does_not_run_is_technical() -> None:
    with pytest.raises(ThirdPartyError, match="the mail server did not take the message: SMTPConnectError"):
        await call(WELCOME, parties_at())


async def test_an_email_goes_to_one_address_or_none(mail: Mail) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011  # how it is refused is not ours to say
        await call(WELCOME.model_copy(update={"email": "eve,ada@example.com"}), parties_at(mail=mail))
    assert mail.taken == []


# The database


def asked(command: Command, *, step: str = "step", direction: Direction = Direction.DO) -> Envelope:
    """Return `command` as a saga of its own sends it."""
    return enveloped(command, saga=SagaLink(uuid4(), step, direction, 1))


Said = tuple[Result | None, str, dict[str, Any]]


class Shop:
    """The shipped handlers on a stage; each failure is final, so that no test waits for a retry it does not want."""

    def __init__(self, stage: Stage, container: AsyncContainer) -> None:
        self.stage = stage
        self._container = container

    async def start(self, *messages: type[Command], retry: Retry | None = None) -> list[Handler]:
        handlers = [replace(HANDLERS[each], retry=retry or Retry(attempts=1)) for each in messages]
        for handler in handlers:
            await self.stage.start(handler, container=self._container)
        return handlers

    async def answer(self) -> Said:
        reply = await self.stage.replies.next()
        return reply.saga.result if reply.saga else None, reply.type, json.loads(reply.data)

    async def tell(self, envelope: Envelope) -> Said:
        await self.stage.send(envelope)
        return await self.answer()

    async def do(self, command: Command) -> Said:
        return await self.tell(asked(command))

    async def stock(self, sku: str, available: int) -> None:
        async with transaction(self.stage.engine) as connection:
            await connection.execute(stock_item.insert().values(sku=sku, available=available))

    async def available(self, sku: str = "lamp") -> int:
        async with transaction(self.stage.engine) as connection:
            found = await connection.execute(select(stock_item.c.available).where(stock_item.c.sku == sku))
            number: int = found.scalar_one()
        return number

    async def reservations(self) -> list[tuple[UUID, str | None, int, str]]:
        async with transaction(self.stage.engine) as connection:
            rows = await connection.execute(stock_reservation.select().order_by(stock_reservation.c.order_id))
            return [(row.order_id, row.sku, row.quantity, row.state) for row in rows]

    async def settings(self, user: UUID) -> dict[str, str]:
        async with transaction(self.stage.engine) as connection:
            rows = await connection.execute(user_setting.select().where(user_setting.c.user_id == user))
            return {row.name: row.value for row in rows}


@asynccontextmanager
async def open_shop(
    database_url: str, parties: ThirdParties | None = None, http: Http | None = None
) -> AsyncIterator[Shop]:
    async with open_stage(database_url) as stage:
        async with transaction(stage.engine) as connection:
            await connection.run_sync(metadata.create_all)
        container = container_of(parties or ThirdParties(), http or Http(None))  # type: ignore[arg-type]  # never asked
        yield Shop(stage, container)
        await container.close()


@pytest.fixture
async def shop(database_url: str) -> AsyncIterator[Shop]:
    """A shop with three lamps."""
    async with open_shop(database_url) as opened:
        await opened.stock("lamp", 3)
        await opened.start(ReserveStock, ReleaseStock, CreateDefaultSettings, RemoveSettings)
        yield opened


SUCCEEDED: Said = (Result.SUCCEEDED, "succeeded", {})


def reserve(quantity: int = 1, *, order: UUID = ORDER, sku: str = "lamp") -> ReserveStock:
    return ReserveStock(order_id=order, sku=sku, quantity=quantity)


async def test_settings_are_made_and_taken_away_for_one_user(shop: Shop) -> None:
    other = uuid4()
    for user in (USER, other):
        assert await shop.do(CreateDefaultSettings(user_id=user, user_name="ada")) == SUCCEEDED
    assert await shop.settings(USER) == DEFAULTS
    for _ in range(2):
        assert await shop.do(RemoveSettings(user_id=USER)) == SUCCEEDED
    assert await shop.settings(USER) == {}
    assert await shop.settings(other) == DEFAULTS


@pytest.mark.parametrize("name", ["admin", "root"])
async def test_a_reserved_user_name_is_declined_and_leaves_nothing(shop: Shop, name: str) -> None:
    said = await shop.do(CreateDefaultSettings(user_id=USER, user_name=name))
    assert said == (Result.DECLINED, "refused", {"reason": f"the user name {name} is reserved"})
    assert await shop.settings(USER) == {}


async def test_stock_is_set_aside_and_put_back_once(shop: Shop) -> None:
    assert await shop.do(reserve(2)) == SUCCEEDED
    assert await shop.available() == 1
    assert await shop.reservations() == [(ORDER, "lamp", 2, "reserved")]
    for _ in range(2):
        assert await shop.do(ReleaseStock(order_id=ORDER)) == SUCCEEDED
        assert await shop.available() == 3
    assert await shop.reservations() == [(ORDER, "lamp", 2, "released")]


async def test_a_reservation_that_is_delivered_twice_is_one(shop: Shop) -> None:
    sent = asked(reserve(2))
    assert await shop.tell(sent) == await shop.tell(sent) == SUCCEEDED
    assert await shop.available() == 1


@pytest.mark.parametrize(("sku", "quantity"), [("lamp", 4), ("unicorn", 1)])
async def test_too_little_stock_is_declined_and_nothing_is_taken(shop: Shop, sku: str, quantity: int) -> None:
    said = await shop.do(reserve(quantity, sku=sku))
    reason = f"fewer than {quantity} of {sku} left"
    assert said == (Result.DECLINED, "stock.short", {"sku": sku, "reason": reason})
    assert await shop.available() == 3
    assert await shop.reservations() == []
    assert await shop.do(ReleaseStock(order_id=ORDER)) == SUCCEEDED
    assert await shop.available() == 3


async def test_a_release_that_comes_first_bars_the_reservation(shop: Shop) -> None:
    assert await shop.do(ReleaseStock(order_id=ORDER)) == SUCCEEDED
    assert await shop.reservations() == [(ORDER, None, 0, "released")]
    reason = "the order was released before it was reserved"
    assert await shop.do(reserve()) == (Result.DECLINED, "stock.short", {"sku": "lamp", "reason": reason})
    assert await shop.do(ReleaseStock(order_id=ORDER)) == SUCCEEDED
    assert await shop.available() == 3
    assert await shop.do(reserve(3, order=uuid4())) == SUCCEEDED, "other orders are served"


@asynccontextmanager
async def shelf_held(url: str) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Hold the lamps' row from outside; yields how to wait until so many transactions queue for it."""
    engine = open_database(url)
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )

    async def until_queued(count: int) -> None:
        async def queued() -> bool:
            async with transaction(engine) as connection:
                return bool((await connection.execute(waiting)).scalar_one() == count)

        await until(queued)

    try:
        async with transaction(engine) as connection:
            await connection.execute(select(stock_item).with_for_update())
            yield until_queued
    finally:
        await engine.dispose()


@pytest.mark.postgres
async def test_of_two_who_want_the_last_one_at_the_same_time_one_gets_it(pg_url: str) -> None:
    async with open_shop(pg_url) as shop:
        await shop.stock("lamp", 1)
        await shop.start(ReserveStock)
        async with shelf_held(pg_url) as until_queued:
            await shop.stage.send(*(asked(reserve(order=uuid4())) for _ in range(2)))
            await until_queued(2)
        said = [await shop.answer() for _ in range(2)]
        assert {result for result, *_ in said} == {Result.SUCCEEDED, Result.DECLINED}
        assert await shop.available() == 0
        assert [state for *_, state in await shop.reservations()] == ["reserved"]


@pytest.mark.postgres
async def test_a_release_that_overtakes_a_reservation_in_the_making_bars_it(pg_url: str) -> None:
    """The reservation has looked for a tombstone before there was one; the second try finds it."""
    async with open_shop(pg_url) as shop:
        await shop.stock("lamp", 1)
        await shop.start(ReserveStock, ReleaseStock, retry=Retry(attempts=2, quick=0, first=5))
        async with shelf_held(pg_url) as until_queued:
            await shop.stage.send(asked(reserve()))
            await until_queued(1)
            assert await shop.do(ReleaseStock(order_id=ORDER)) == SUCCEEDED
        await shop.stage.pass_delay(1, 5)
        assert (await shop.answer())[:2] == (Result.DECLINED, "stock.short")
        assert await shop.available() == 1
        assert await shop.reservations() == [(ORDER, None, 0, "released")]


# Secrets


PASSWORD, TOKEN, CARD = "pass-word-1", "hook-token-2", "tok-secret-3"


@pytest.fixture
def process_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Callable[[], str]]:
    """Log as a process of ours does, at a level; returns how to read what was logged."""

    def begin(level: str) -> Callable[[], str]:
        root = logging.getLogger()
        monkeypatch.setattr(root, "handlers", [])
        for name in (None, "aio_pika", "alembic", "httpx2", "httpcore2", "aiormq"):
            logger = logging.getLogger(name)
            monkeypatch.setattr(logger, "level", logger.level)
        log_to_stderr(level, "text")
        return lambda: capsys.readouterr().err

    return begin


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n<", b""],
    ids=["no", "nonsense", "nothing"],
)
async def test_secrets_of_third_parties_are_neither_logged_nor_kept(
    database_url: str, web: Web, http: Http, process_log: Callable[[str], Callable[[], str]], level: str, answer: bytes
) -> None:
    """Not by us, nor by the libraries as a process of ours sets them up; only the message itself is kept whole."""
    web.answer = answer
    with_password = web.url.replace("//", f"//shop:{PASSWORD}@")
    parties = parties_at(web, payments_url=f"{with_password}/payments", webhook_url=f"{web.url}/hook/{TOKEN}")
    async with open_shop(database_url, parties, http) as shop:
        logged = process_log(level)
        await shop.start(ChargeCard, NotifyAdmins)
        said = [await shop.do(ChargeCard(order_id=ORDER, amount=TOTAL, card=CARD)), await shop.do(NOTIFY.command)]
        assert [result for result, *_ in said] == [Result.FAILED] * 2
        letters = await shop.stage.dead_letters(2)
    log = logged()
    assert "gave up on" in log
    assert [each.path for each in web.asked] == ["/payments/charges", f"/hook/{TOKEN}"]
    for told in (log, str(said), *(f"{letter.reason} {letter.detail}" for letter in letters)):
        for secret in (PASSWORD, TOKEN):
            assert secret not in told
        assert level == "DEBUG" or CARD not in told


async def test_a_url_that_cannot_be_one_is_not_shown(http: Http) -> None:
    """What stands where a port should be may be a password with a slash in it; causes are kept in dead letters, too."""
    parties = parties_at(payments_url=f"http://shop:{PASSWORD}/x@bank.example")
    with pytest.raises(ThirdPartyError) as caught:
        await call(CHARGE.command, parties, http)
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))
