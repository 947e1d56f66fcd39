"""Local stand-ins for the third parties, on free ports of the loopback address.

They honour idempotency keys, keep a journal that survives `kill -9`, and fail where the data says so, as the
sandboxes of payment providers do:

| where | value | what happens |
|---|---|---|
| e-mail | `...@nowhere.example` | the mail server refuses the mailbox (550) |
| e-mail | `...@busy.example` | the mail server puts each e-mail off twice (451), then takes it |
| e-mail | `...@moody.example` | the mail server puts off every welcome (451), every time |
| e-mail | `...@unwanted.example` | the mailing list refuses the address (403) |
| e-mail | `...@flaky.example` | the mailing list answers 503 twice, then subscribes |
| e-mail | `...@broken.example` | the mailing list answers 503 every time |
| full name | contains `Spam` | the administrators refuse the account (403) |
| full name | contains `Flaky` | the administrators' webhook answers 503 twice, then takes the word |
| full name | contains `Broken` | the administrators' webhook answers 503 every time |
| card | `declined` | the bank declines (402) |
| card | `flaky` | the payment provider answers 503 twice, then charges |
| card | `broken` | the payment provider answers 503 every time |
| card | `vanishing` | the card is charged, and then the answer is lost (503), every time |
| address | contains `Nowhere` | the carrier does not deliver there (422) |
| address | contains `Fog` | the carrier answers 503 twice, then ships |
| address | contains `Flood` | the carrier answers 503 every time |

The steps that talk to nobody decline by data, too: the user names `admin` and `root` are reserved, and there are no
unicorns in stock.
"""

import asyncio
import json
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from email import policy
from email.parser import BytesHeaderParser
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
_FLAKY_FAILURES = 2  # one less than the handlers' attempts


class ThirdPartyRules:
    """What the third parties do when they are asked."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._routes: dict[tuple[str, str], tuple[Callable[[str, dict[str, Any]], Answer], set[str]]] = {
            ("POST", "/payments/charges"): (self._charge, {"order_id", "amount", "currency", "card"}),
            ("POST", "/payments/refunds"): (self._refund, {"order_id"}),
            ("POST", "/mailing-list/members"): (self._subscribe, {"email"}),
            ("POST", "/webhook"): (self._notify, {"text"}),
            ("POST", "/shipping/shipments"): (self._ship, {"order_id", "address"}),
        }

    def answer(self, method: str, path: str, key: str, body: dict[str, Any]) -> Answer:
        """Return the answer to an HTTP request; effects are in the journal by then."""
        if (method, path) in self._routes:
            route, fields = self._routes[method, path]
            if missing := fields - body.keys():
                return HTTPStatus.BAD_REQUEST, {"reason": f"send {', '.join(sorted(missing))}"}
            if not key:
                return HTTPStatus.BAD_REQUEST, {"reason": "send an Idempotency-Key"}
            return route(key, body)
        collection, _, name = path.rpartition("/")
        if (method, collection) == ("DELETE", "/mailing-list/members"):
            return self._remove("subscription", "unsubscription", unquote(name))
        if (method, collection) == ("DELETE", "/shipping/shipments"):
            return self._remove("shipment", "cancellation", unquote(name))
        return HTTPStatus.NOT_FOUND, {"reason": "no such service"}

    def accept_mail(self, key: str, recipients: list[str], subject: str) -> str:
        """Return the answer to an e-mail; one with the same Message-ID is the same e-mail."""
        domains = {recipient.rpartition("@")[2] for recipient in recipients}
        if "moody.example" in domains and subject == "Welcome":
            return "451 not in the mood for welcomes"
        if "busy.example" in domains and self._fails_at_first(key):
            return "451 busy, try again later"
        self._journal.once(key, "e-mail", of=", ".join(recipients), subject=subject)
        return "250 OK"

    def _fails_at_first(self, key: str) -> bool:
        """Say whether what is asked for under `key` still fails, and count."""
        if self._journal.attempts(key) == _FLAKY_FAILURES:
            return False
        self._journal.note_attempt(key)
        return True

    def _create(self, key: str, what: str, *, of: str, **about: Any) -> Answer:
        effect = self._journal.once(key, what, of=of, **about)
        return HTTPStatus.CREATED, {"id": f"{effect['what']}-{effect['of']}"}

    def _charge(self, key: str, body: dict[str, Any]) -> Answer:
        card = body["card"]
        if card == "declined":
            return HTTPStatus.PAYMENT_REQUIRED, {"code": "insufficient_funds"}
        if card == "broken" or (card == "flaky" and self._fails_at_first(key)):
            return _UNAVAILABLE
        created = self._create(key, "charge", of=body["order_id"], amount=body["amount"], currency=body["currency"])
        return _UNAVAILABLE if card == "vanishing" else created

    def _refund(self, key: str, body: dict[str, Any]) -> Answer:
        charge = self._journal.find_of("charge", body["order_id"])
        if charge is None:
            return HTTPStatus.NOT_FOUND, {"reason": "nothing was charged"}
        return self._create(key, "refund", of=body["order_id"], amount=charge["amount"], currency=charge["currency"])

    def _subscribe(self, key: str, body: dict[str, Any]) -> Answer:
        domain = body["email"].rpartition("@")[2]
        if domain == "unwanted.example":
            return HTTPStatus.FORBIDDEN, {"reason": "we do not want this domain"}
        if domain == "broken.example" or (domain == "flaky.example" and self._fails_at_first(key)):
            return _UNAVAILABLE
        return self._create(key, "subscription", of=body["email"])

    def _notify(self, key: str, body: dict[str, Any]) -> Answer:
        if "Spam" in body["text"]:
            return HTTPStatus.FORBIDDEN, {"reason": "looks like spam"}
        if "Broken" in body["text"] or ("Flaky" in body["text"] and self._fails_at_first(key)):
            return _UNAVAILABLE
        self._create(key, "notification", of=body["text"])
        return HTTPStatus.OK, {}

    def _ship(self, key: str, body: dict[str, Any]) -> Answer:
        if "Nowhere" in body["address"]:
            return HTTPStatus.UNPROCESSABLE_ENTITY, {"reason": "we do not deliver there"}
        if "Flood" in body["address"] or ("Fog" in body["address"] and self._fails_at_first(key)):
            return _UNAVAILABLE
        return self._create(key, "shipment", of=body["order_id"])

    def _remove(self, what: str, undone: str, of: str) -> Answer:
        done = self._journal.find_of(what, of)
        if done is None:
            return HTTPStatus.NOT_FOUND, {}
        self._journal.once(f"{undone} of {done['key']}", undone, of=of)
        return HTTPStatus.NO_CONTENT, {}


@asynccontextmanager
async def running_services(journal: Path) -> AsyncIterator[tuple[ThirdParties, Journal]]:
    """Run all stand-ins; yields where they are, and what they have done.

    Raises:
        ConfigurationError: they run on this journal already.
    """
    with closing(Journal(journal)) as book:
        rules = ThirdPartyRules(book)
        async with _http_server(rules) as http_port, _mail_server(rules) as smtp_port:
            base = f"http://127.0.0.1:{http_port}"
            parties = ThirdParties(
                payments_url=f"{base}/payments",
                mailing_list_url=f"{base}/mailing-list",
                webhook_url=f"{base}/webhook",
                shipping_url=f"{base}/shipping",
                smtp_host="127.0.0.1",
                smtp_port=smtp_port,
            )
            yield parties, book


@asynccontextmanager
async def _mail_server(rules: ThirdPartyRules) -> AsyncIterator[int]:
    sessions: weakref.WeakSet[SMTP] = weakref.WeakSet()

    def begin() -> SMTP:
        session = SMTP(_MailHandler(rules), hostname="localhost", enable_SMTPUTF8=True)
        sessions.add(session)
        return session

    server = await asyncio.get_running_loop().create_server(begin, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for session in sessions:
            if session.transport is not None:
                session.transport.close()
        await server.wait_closed()


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
        headers = BytesHeaderParser(policy=policy.SMTP).parsebytes(
            content.encode() if isinstance(content, str) else content
        )
        if not (key := str(headers.get("Message-ID", "")).strip()):
            return "554 no Message-ID"
        return self._rules.accept_mail(key, envelope.rcpt_tos, str(headers.get("Subject", "")))


@asynccontextmanager
async def _http_server(rules: ThirdPartyRules) -> AsyncIterator[int]:
    connections: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        try:
            while await _answer_one(rules, reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has gone: nobody is left to answer
        finally:
            connections.discard(writer)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in connections:  # a client that keeps its connection alive must not keep us waiting
            writer.close()
        await server.wait_closed()


async def _answer_one(rules: ThirdPartyRules, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Answer one request; return whether the connection is kept for another."""
    request = (await reader.readline()).split()
    if not request:
        return False
    headers: dict[str, str] = {}
    while line := (await reader.readline()).decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    keep = headers.get("connection", "").lower() != "close"
    try:
        method, target, _ = (part.decode("ascii") for part in request)
        content = await reader.readexactly(int(headers.get("content-length", "0")))
        body = json.loads(content or b"{}")
        if not isinstance(body, dict):
            raise TypeError("send a JSON object")  # noqa: TRY301  # one answer for all that cannot be read
    except (ValueError, TypeError) as error:
        keep = False  # where the next request begins is not known
        status, document = HTTPStatus.BAD_REQUEST, {"reason": str(error)}
    else:
        status, document = rules.answer(method, target, headers.get("idempotency-key", ""), body)
    payload = b"" if status is HTTPStatus.NO_CONTENT else json.dumps(document).encode()
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
    if not keep:
        head += "connection: close\r\n"
    length = "" if status is HTTPStatus.NO_CONTENT else f"content-length: {len(payload)}\r\n"
    writer.write(f"{head}{length}\r\n".encode() + payload)
    await writer.drain()
    return keep
