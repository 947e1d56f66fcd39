"""What a message needs before it runs: its turn among those of its key, a slot, and nobody who must be alone."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

from events.envelope import Envelope
from events.errors import RejectedError
from events.message import Message
from events.registry import Registry
from handlers.definition import Handler
from handlers.limits import Slots
from handlers.tools import Tools

logger = logging.getLogger(__name__)


class Places:
    """The places of one handler.

    Args:
        handler: whose they are.
        registry: reads messages, to tell their keys.
        slots: how many run side by side.
        tools: the keys that are in work, and who is alone.
    """

    def __init__(self, handler: Handler, *, registry: Registry, slots: Slots, tools: Tools) -> None:
        self._handler = handler
        self._registry = registry
        self._slots = slots
        self._tools = tools

    @asynccontextmanager
    async def of(self, envelope: Envelope, *, at_once: bool) -> AsyncIterator[None]:
        """Hold what a message needs to run: its turn among those of its key, a slot, and no one who must be alone."""
        key = None if self._handler.key is None else self._key_of(envelope, self._handler.key)
        async with AsyncExitStack() as stack:
            while not await self._take(stack, key, at_once=at_once):
                await stack.aclose()
                async with self._tools.isolation.shared():
                    pass
            yield

    async def _take(self, stack: AsyncExitStack, key: str | None, *, at_once: bool) -> bool:
        """Take what is to be held into `stack`; return False if it must be given back until nobody is alone."""
        if key is not None:
            await stack.enter_async_context(self._tools.keys.of(f"{self._handler.name}:{key}"))
        if not at_once:
            if self._handler.key is not None:
                await self._slots.acquire()
            stack.callback(self._slots.release)
            if key is not None and self._tools.isolation.is_taken:  # who is alone may wait for this very key
                return False
            await stack.enter_async_context(self._tools.isolation.shared())
        return True

    def _key_of(self, envelope: Envelope, key: Callable[[Message], object]) -> str | None:
        try:
            return str(key(self._registry.read(envelope)))
        except RejectedError:
            return None  # it is no message, as will be found in a moment
        except Exception as error:  # noqa: BLE001  # a function of the user's
            logger.warning(
                "the key of %s for %s cannot be told: %r",
                envelope.id,
                self._handler.name,
                error,
                extra={"action": "handler.no_key", "handler": self._handler.name},
            )
            return None
