"""The third parties that the shipped handlers talk to, and where they are."""

from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Any

import httpx2
from dishka import Provider, Scope, provide
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from events.errors import CoordinatorError
from handlers.breaker import Breaker

_TIMEOUT = httpx2.Timeout(5.0, pool=10.0)
_HERE = "http://127.0.0.1:8080"
_LIMITS = httpx2.Limits(max_connections=50, max_keepalive_connections=20)


class ThirdPartyError(CoordinatorError):
    """A third party did not do what it was asked, and did not say no either; it is asked again.

    Args:
        text: who it was, and what it said.
        retry_after: the seconds for which it wants to be left alone.
    """

    code = "third_party"

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


def breaker_of(service: str) -> Breaker:
    """Return the breaker of a third party: only errors of its own open it."""
    return Breaker(service, on=(ThirdPartyError, TimeoutError))


class ThirdParties(BaseSettings):
    """Where the third parties are: `SHOP_PAYMENTS_URL` and so on."""

    model_config = SettingsConfigDict(env_prefix="SHOP_", extra="ignore", frozen=True)

    # URLs may hold passwords, and whoever knows a webhook may write to it: not shown.
    payments_url: str = Field(default=f"{_HERE}/payments", repr=False, description="the payment provider")
    mailing_list_url: str = Field(default=f"{_HERE}/mailing-list", repr=False, description="the mailing list")
    webhook_url: str = Field(default=f"{_HERE}/webhook", repr=False, description="the administrators' webhook")
    shipping_url: str = Field(default=f"{_HERE}/shipping", repr=False, description="the carrier")
    smtp_host: str = Field(default="127.0.0.1", description="the mail server")
    smtp_port: int = Field(default=2525, ge=1, le=65535)
    sender: str = Field(default="shop@example.com", description="the sender of all e-mails")


class Http:
    """JSON over HTTP.

    An answer of 500 or more, one of 429, or none at all, is an error; all others are the caller's to judge.
    """

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._client = client

    async def call(
        self, service: str, method: str, url: str, *, key: str | None = None, body: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Return status and JSON object of the answer; `key` goes into the header `Idempotency-Key`.

        Raises:
            ThirdPartyError: there was no answer, or one that says nothing.
        """
        headers = {"Idempotency-Key": key} if key else {}
        try:
            answer = await self._client.request(method, url, json=body, headers=headers)
            document = answer.json() if answer.content else {}
        except httpx2.InvalidURL:
            raise ThirdPartyError(f"the URL of {service} is none") from None  # its text shows what is in the URL
        except (httpx2.HTTPError, ValueError) as error:
            raise ThirdPartyError(f"{service} gave no answer: {type(error).__name__}") from error
        if answer.status_code >= 500 or answer.status_code == HTTPStatus.TOO_MANY_REQUESTS:  # noqa: PLR2004  # server errors, RFC 9110, section 15.6
            raise ThirdPartyError(f"{service} answered {answer.status_code}", _seconds(answer.headers))
        return answer.status_code, document if isinstance(document, dict) else {}

    @staticmethod
    def unexpected(service: str, status: int) -> ThirdPartyError:
        """Return the error for an answer that the contract with `service` does not have."""
        return ThirdPartyError(f"{service} answered {status}, which is not in its contract")


def _seconds(headers: Mapping[str, str]) -> float | None:
    """Return what the header `Retry-After` says, in seconds; a date is left to our own backoff (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdigit() else None


class ThirdPartyProvider(Provider):
    """Makes what the shipped handlers ask for: settings and one HTTP client for the whole process."""

    scope = Scope.APP

    def __init__(self, settings: ThirdParties | None = None) -> None:
        super().__init__()
        self._settings = settings

    @provide
    def settings(self) -> ThirdParties:
        """Return the given settings, or those of the environment."""
        return self._settings or ThirdParties()

    @provide
    async def http(self) -> AsyncIterator[Http]:
        """Open the client, and close it with the process."""
        async with httpx2.AsyncClient(timeout=_TIMEOUT, limits=_LIMITS, follow_redirects=False) as client:
            yield Http(client)
