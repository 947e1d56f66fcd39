"""Local stand-ins for the third parties, on free ports of the loopback address.

They honour idempotency keys, keep a journal that survives `kill -9`, and fail where the data says so, as the
sandboxes of payment providers do:

| where | value | what happens |
|---|---|---|
| e-mail | `...@nowhere.example` | the mail server refuses the mailbox (550) |
| e-mail | `...@unwanted.example` | the mailing list refuses the address (403) |
| e-mail | `...@flaky.example` | the mailing list answers 503 the first time |
| e-mail | `...@broken.example` | the mailing list answers 503 every time |
| full name | contains `Spam` | the administrators refuse the account (403) |
| card | `declined` | the bank declines (402) |
| card | `flaky` | the payment provider answers 503 the first time |
| card | `broken` | the payment provider answers 503 every time |
| card | `vanishing` | the card is charged, and then the answer is lost (503), every time |
| address | contains `Nowhere` | the carrier does not deliver there (422) |
| address | contains `Flood` | the carrier answers 503 every time |
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from coordinator.demo.journal import Journal
from events.errors import ConfigurationError
from handlers.catalog.resources import ThirdParties

try:
    from aiosmtpd.smtp import SMTP, Envelope, Session
except ImportError as error:  # pragma: no cover
    raise ConfigurationError(
        "the demonstration needs a mail server to talk to: pip install 'saga-coordinator[demo]'"
    ) from error

Answer = tuple[HTTPStatus, dict[str, Any]]
_UNAVAILABLE: Answer = (HTTPStatus.SERVICE_UNAVAILABLE, {})


class ThirdPartyRules:
    """What the third parties do when they are asked."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def answer(self, method: str, path: str, key: str, body: dict[str, Any]) -> Answer:
        """Return the answer to an HTTP request; effects are in the journal by then."""
        routes: dict[tuple[str, str], Callable[[str, dict[str, Any]], Answer]] = {
            ("POST", "/payments/charges"): self._charge,
            ("POST", "/payments/refunds"): self._refund,
            ("POST", "/mailing-list/members"): self._subscribe,
            ("POST", "/webhook"): self._notify,
            ("POST", "/shipping/shipments"): self._ship,
        }
        if route := routes.get((method, path)):
            if not key:
                return HTTPStatus.BAD_REQUEST, {"reason": "send an Idempotency-Key"}
            return route(key, body)
        collection, _, name = path.rpartition("/")
        if (method, collection) == ("DELETE", "/mailing-list/members"):
            return self._remove("subscription", "unsubscription", unquote(name))
        if (method, collection) == ("DELETE", "/shipping/shipments"):
            return self._remove("shipment", "cancellation", name)
        return HTTPStatus.BAD_REQUEST, {"reason": "no such service"}

    def accept_mail(self, key: str, recipient: str, subject: str) -> None:
        """Take an e-mail; one with the same Message-ID is the same e-mail."""
        if self._journal.find(key) is None:
            self._journal.record(key, "e-mail", to=recipient, subject=subject)

    def _flaky(self, key: str) -> bool:
        """Say whether this is the first time."""
        first = self._journal.attempts(key) == 0
        self._journal.note_attempt(key)
        return first

    def _create(self, key: str, what: str, **about: Any) -> Answer:
        effect = self._journal.find(key) or self._journal.record(key, what, **about)
        return HTTPStatus.CREATED, {"id": f"{effect['what']}-{effect['of']}"}

    def _charge(self, key: str, body: dict[str, Any]) -> Answer:
        card = body["card"]
        if card == "declined":
            return HTTPStatus.PAYMENT_REQUIRED, {"code": "insufficient_funds"}
        if card == "broken" or (card == "flaky" and self._flaky(key)):
            return _UNAVAILABLE
        created = self._create(key, "charge", of=body["order_id"], amount=body["amount"])
        return _UNAVAILABLE if card == "vanishing" else created

    def _refund(self, key: str, body: dict[str, Any]) -> Answer:
        charge = self._journal.find(body["charge_key"])
        if charge is None:
            return HTTPStatus.NOT_FOUND, {}
        return self._create(key, "refund", of=body["order_id"], amount=charge["amount"])

    def _subscribe(self, key: str, body: dict[str, Any]) -> Answer:
        email = body["email"]
        domain = email.rpartition("@")[2]
        if domain == "unwanted.example":
            return HTTPStatus.FORBIDDEN, {"reason": "we do not want this domain"}
        if domain == "broken.example" or (domain == "flaky.example" and self._flaky(key)):
            return _UNAVAILABLE
        return self._create(key, "subscription", of=email)

    def _notify(self, key: str, body: dict[str, Any]) -> Answer:
        if "Spam" in body["text"]:
            return HTTPStatus.FORBIDDEN, {"reason": "looks like spam"}
        self._create(key, "notification", of=body["text"])
        return HTTPStatus.OK, {}

    def _ship(self, key: str, body: dict[str, Any]) -> Answer:
        if "Nowhere" in body["address"]:
            return HTTPStatus.UNPROCESSABLE_ENTITY, {"reason": "we do not deliver there"}
        if "Flood" in body["address"]:
            return _UNAVAILABLE
        return self._create(key, "shipment", of=body["order_id"])

    def _remove(self, what: str, undone: str, of: str) -> Answer:
        if not any(effect["of"] == of for effect in self._journal.all(what)):
            return HTTPStatus.NOT_FOUND, {}
        self._create(f"{undone}:{of}", undone, of=of)
        return HTTPStatus.NO_CONTENT, {}


@asynccontextmanager
async def running_services(journal: Path) -> AsyncIterator[tuple[ThirdParties, Journal]]:
    """Run all stand-ins; yields where they are, and what they have done."""
    book = Journal(journal)
    rules = ThirdPartyRules(book)
    http = await asyncio.start_server(lambda r, w: _serve(rules, r, w), "127.0.0.1", 0)
    mail = await asyncio.get_running_loop().create_server(
        lambda: SMTP(_MailHandler(rules), hostname="localhost", enable_SMTPUTF8=True), "127.0.0.1", 0
    )
    base = f"http://127.0.0.1:{http.sockets[0].getsockname()[1]}"
    try:
        yield (
            ThirdParties(
                payments_url=f"{base}/payments",
                mailing_list_url=f"{base}/mailing-list",
                webhook_url=f"{base}/webhook",
                shipping_url=f"{base}/shipping",
                smtp_host="127.0.0.1",
                smtp_port=mail.sockets[0].getsockname()[1],
            ),
            book,
        )
    finally:
        for server in (http, mail):
            server.close()
            await server.wait_closed()
        book.close()


class _MailHandler:
    """The mail server's decisions, under the names that aiosmtpd looks for."""

    def __init__(self, rules: ThirdPartyRules) -> None:
        self._rules = rules

    async def handle_RCPT(  # noqa: N802  # aiosmtpd's name
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        if address.endswith("@nowhere.example"):
            return "550 no such mailbox"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        content = envelope.content or b""
        text = content if isinstance(content, str) else content.decode(errors="replace")
        lines = text.partition("\r\n\r\n")[0].splitlines()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        for recipient in envelope.rcpt_tos:
            self._rules.accept_mail(headers["message-id"], recipient, headers["subject"])
        return "250 OK"


async def _serve(rules: ThirdPartyRules, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests of one connection until the client closes it."""
    try:
        while request := await reader.readline():
            method, target, _ = request.decode().split()
            headers: dict[str, str] = {}
            while line := (await reader.readline()).decode().strip():
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            content = await reader.readexactly(int(headers.get("content-length", "0")))
            body = json.loads(content) if content else {}
            status, document = rules.answer(method, target, headers.get("idempotency-key", ""), body)
            payload = b"" if status is HTTPStatus.NO_CONTENT else json.dumps(document).encode()
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
            await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass  # the client has gone: nobody is left to answer
    finally:
        writer.close()
