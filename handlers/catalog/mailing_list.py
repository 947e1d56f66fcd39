"""The mailing list, over HTTP."""

from http import HTTPStatus
from urllib.parse import quote

from events.catalog.users import SubscribeToMailingList, UnsubscribeFromMailingList
from handlers.catalog.resources import Http, ThirdParties, breaker_of
from handlers.context import Context, Declined
from handlers.definition import handles

_SERVICE = "the mailing list"
_BREAKER = breaker_of(_SERVICE)


@handles(SubscribeToMailingList, timeout=15, breaker=_BREAKER)
async def subscribe_to_mailing_list(
    command: SubscribeToMailingList, http: Http, parties: ThirdParties, context: Context
) -> None:
    """Subscribe; decline if the list does not want the address."""
    url = f"{parties.mailing_list_url}/members"
    status, answer = await http.call(_SERVICE, "POST", url, key=context.idempotency_key, body={"email": command.email})
    if status == HTTPStatus.FORBIDDEN:
        raise Declined(f"the mailing list refuses the address: {answer.get('reason', '')}")
    if status != HTTPStatus.CREATED:
        raise http.unexpected(_SERVICE, status)


@handles(UnsubscribeFromMailingList, timeout=15, breaker=_BREAKER)
async def unsubscribe_from_mailing_list(command: UnsubscribeFromMailingList, http: Http, parties: ThirdParties) -> None:
    """Unsubscribe; the address may not be on the list."""
    url = f"{parties.mailing_list_url}/members/{quote(command.email, safe='')}"
    status, _ = await http.call(_SERVICE, "DELETE", url)
    if status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_FOUND):
        raise http.unexpected(_SERVICE, status)
