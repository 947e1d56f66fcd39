"""Word to the administrators, over a webhook as chat services have them."""

from http import HTTPStatus

from events.catalog.users import NotifyAdmins
from handlers.catalog.resources import Http, ThirdParties, breaker_of
from handlers.context import Context, Declined
from handlers.definition import handles

_SERVICE = "the administrators' webhook"
_BREAKER = breaker_of(_SERVICE)


@handles(NotifyAdmins, timeout=15, breaker=_BREAKER)
async def notify_admins(command: NotifyAdmins, http: Http, parties: ThirdParties, context: Context) -> None:
    """Post a line about the new account; decline if the administrators refuse it."""
    text = f"New account {command.user_name}: {command.full_name}"
    status, answer = await http.call(
        _SERVICE, "POST", parties.webhook_url, key=context.idempotency_key, body={"text": text}
    )
    if status == HTTPStatus.FORBIDDEN:
        raise Declined(f"the administrators refuse the account: {answer.get('reason', '')}")
    if status != HTTPStatus.OK:
        raise http.unexpected(_SERVICE, status)
