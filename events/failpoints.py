"""Named places in the code where a test can make the process die, raise or stall. Inert in production.

A fail point costs one look into an empty dictionary. Tests arm them with `armed(...)`.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

Action = Callable[[], Awaitable[None]]

_armed: dict[str, Action] = {}


async def failpoint(name: str) -> None:
    """Do what a test has armed under `name`; normally nothing."""
    if _armed and (action := _armed.get(name)):
        await action()


@contextmanager
def armed(name: str, action: Action) -> Iterator[None]:
    """Arm `action` at the fail point `name` for the length of the block."""
    _armed[name] = action
    try:
        yield
    finally:
        del _armed[name]
