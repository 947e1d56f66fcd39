"""Shipments, over HTTP."""

from http import HTTPStatus

from events.catalog.orders import CancelShipment, OrderShipped, ShipmentRefused, ShipOrder
from handlers.catalog.resources import Http, ThirdParties, breaker_of
from handlers.context import Declined
from handlers.definition import handles

_SERVICE = "the carrier"
_BREAKER = breaker_of(_SERVICE)


@handles(ShipOrder, timeout=15, breaker=_BREAKER)
async def ship_order(command: ShipOrder, http: Http, parties: ThirdParties) -> OrderShipped:
    """Hand the goods over; decline if the carrier does not deliver there."""
    body = {"order_id": str(command.order_id), "address": command.address}
    url, key = f"{parties.shipping_url}/shipments", f"ship:{command.order_id}"
    status, answer = await http.call(_SERVICE, "POST", url, key=key, body=body)
    if status == HTTPStatus.UNPROCESSABLE_ENTITY:
        raise Declined(ShipmentRefused(order_id=command.order_id, reason=str(answer.get("reason", ""))[:500]))
    if status != HTTPStatus.CREATED:
        raise http.unexpected(_SERVICE, status)
    return OrderShipped(order_id=command.order_id, shipment_id=str(answer["id"]))


@handles(CancelShipment, timeout=15, breaker=_BREAKER)
async def cancel_shipment(command: CancelShipment, http: Http, parties: ThirdParties) -> None:
    """Stop the shipment; there may be none."""
    url = f"{parties.shipping_url}/shipments/{command.order_id}"
    status, _ = await http.call(_SERVICE, "DELETE", url)
    if status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_FOUND):
        raise http.unexpected(_SERVICE, status)
