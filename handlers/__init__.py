"""Who acts: single-purpose, idempotent handlers of events and commands."""

from handlers.breaker import Breaker
from handlers.context import Context, Declined, RetryAfter
from handlers.definition import Handler, handles
from handlers.policy import Retry

__all__ = ["Breaker", "Context", "Declined", "Handler", "Retry", "RetryAfter", "handles"]
