"""Charges and refunds, over HTTP. The order is the key: it is charged once and refunded once."""

from http import HTTPStatus

from events.catalog.payments import ChargeCard, PaymentCaptured, PaymentFailed, PaymentRefunded, RefundCard
from handlers.catalog.resources import Http, ThirdParties, breaker_of
from handlers.context import Declined
from handlers.definition import handles

_SERVICE = "the payment provider"
_BREAKER = breaker_of(_SERVICE)


@handles(ChargeCard, timeout=15, breaker=_BREAKER)
async def charge_card(command: ChargeCard, http: Http, parties: ThirdParties) -> PaymentCaptured:
    """Charge the card; decline if the bank says no."""
    body = {
        "order_id": str(command.order_id),
        "amount": command.amount.minor,
        "currency": command.amount.currency,
        "card": command.card,
    }
    url, key = f"{parties.payments_url}/charges", f"charge:{command.order_id}"
    status, answer = await http.call(_SERVICE, "POST", url, key=key, body=body)
    if status == HTTPStatus.PAYMENT_REQUIRED:
        raise Declined(PaymentFailed(order_id=command.order_id, reason=str(answer.get("code", "declined"))[:500]))
    if status != HTTPStatus.CREATED:
        raise http.unexpected(_SERVICE, status)
    return PaymentCaptured(order_id=command.order_id, charge_id=str(answer["id"]), amount=command.amount)


@handles(RefundCard, timeout=15, breaker=_BREAKER)
async def refund_card(command: RefundCard, http: Http, parties: ThirdParties) -> PaymentRefunded | None:
    """Give the money back, if any was taken: the provider knows, even where we never heard of the charge."""
    body = {"order_id": str(command.order_id), "charge_key": f"charge:{command.order_id}"}
    url, key = f"{parties.payments_url}/refunds", f"refund:{command.order_id}"
    status, answer = await http.call(_SERVICE, "POST", url, key=key, body=body)
    if status == HTTPStatus.NOT_FOUND:
        return None
    if status != HTTPStatus.CREATED:
        raise http.unexpected(_SERVICE, status)
    return PaymentRefunded(order_id=command.order_id, refund_id=str(answer["id"]))
