"""Who acts: single-purpose, idempotent handlers of events and commands."""

from handlers.context import Context, Declined
from handlers.definition import Handler, Retry, handles

__all__ = ["Context", "Declined", "Handler", "Retry", "handles"]
