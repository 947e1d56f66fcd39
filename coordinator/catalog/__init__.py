"""The application that is shipped: `coordinator run coordinator.catalog:app`."""

from coordinator.app import App
from coordinator.catalog.document_approval import DocumentApproval
from coordinator.catalog.place_order import PlaceOrder
from coordinator.catalog.sign_up import SignUp
from handlers.catalog import all_handlers
from handlers.catalog.resources import ThirdParties, ThirdPartyProvider
from handlers.catalog.tables import metadata

__all__ = ["DocumentApproval", "PlaceOrder", "SignUp", "app", "make_app"]


def make_app(third_parties: ThirdParties | None = None) -> App:
    """Return the application; `third_parties` says where others are, by default the environment does."""
    return App(
        "shop",
        sagas=[SignUp, PlaceOrder],
        handlers=all_handlers,
        resources=[ThirdPartyProvider(third_parties)],
        tables=[metadata],
        lifecycles=[DocumentApproval],
    )


app = make_app()
