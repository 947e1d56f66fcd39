"""The handlers that are shipped: settings, e-mail, mailing list, notifications, stock, payments, shipping."""

from handlers.catalog.email import send_refusal_email, send_welcome_email
from handlers.catalog.mailing_list import subscribe_to_mailing_list, unsubscribe_from_mailing_list
from handlers.catalog.notifications import notify_admins
from handlers.catalog.payments import charge_card, refund_card
from handlers.catalog.settings import create_default_settings, remove_settings
from handlers.catalog.shipping import cancel_shipment, ship_order
from handlers.catalog.stock import release_stock, reserve_stock

all_handlers = (
    cancel_shipment,
    charge_card,
    create_default_settings,
    notify_admins,
    refund_card,
    release_stock,
    remove_settings,
    reserve_stock,
    send_refusal_email,
    send_welcome_email,
    ship_order,
    subscribe_to_mailing_list,
    unsubscribe_from_mailing_list,
)

__all__ = ["all_handlers"]
