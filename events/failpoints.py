"""Named places in the code where a test can make the process die, raise or stall. Inert in production.

A fail point costs one look into an empty dictionary. Tests arm them with `armed(...)`.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

Action = Callable[[], Awaitable[None]]

NAMES = frozenset(
    {
        "engine.received",
        "engine.before_commit",
        "engine.after_commit",
        "engine.after_ack",
        "engine.timers_claimed",
        "engine.timers_committed",
        "handler.received",
        "handler.after_run",
        "handler.before_commit",
        "handler.after_commit",
        "handler.after_ack",
        "handler.draining",
        "node.declared",
        "relay.claimed",
        "relay.before_publish",
        "relay.after_confirm",
        "relay.before_delete",
        "retries.before_claim",
        "retries.claimed",
        "schema.before_commit",
    }
)

_armed: dict[str, Action] = {}


async def failpoint(name: str) -> None:
    """Do what a test has armed under `name`; normally nothing."""
    if _armed and (action := _armed.get(name)):
        await action()


@contextmanager
def armed(name: str, action: Action) -> Iterator[None]:
    """Arm `action` at the fail point `name` for the length of the block.

    Raises:
        KeyError: there is no fail point of this name.
    """
    if name not in NAMES:
        raise KeyError(name)
    _armed[name] = action
    try:
        yield
    finally:
        del _armed[name]
