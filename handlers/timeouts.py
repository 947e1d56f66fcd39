"""The time that a try may take. Who swallows the cancellation that ends it is cancelled again, until it has ended."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

logger = logging.getLogger(__name__)

_CANCEL_AGAIN = 3.0  # seconds


class Timeouts:
    """Ends the tries of one handler that take too long.

    Python cannot end a task against its will: `except BaseException` around an `await` is enough to go on.

    Args:
        name: the handler.
        seconds: how long a try may take.
    """

    def __init__(self, name: str, seconds: float) -> None:
        self._name = name
        self._seconds = seconds
        self._ignored: dict[asyncio.Task[object], int] = {}  # how many cancellations a try has not ended after

    @property
    def overdue(self) -> float:
        """For how many seconds a try has gone on that was cancelled; 0 if there is none."""
        return max(self._ignored.values(), default=0) * _CANCEL_AGAIN

    @asynccontextmanager
    async def limit(self, message_id: str) -> AsyncIterator[None]:
        """Cancel the block when its time is over, and again while it goes on.

        Raises:
            TimeoutError: it has ended for that reason.
        """
        task = cast("asyncio.Task[object]", asyncio.current_task())
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def insist() -> None:
            nonlocal timer
            self._ignored[task] = self._ignored.get(task, 0) + 1
            logger.warning(
                "%s goes on with %s %.0f s after it was cancelled, and is cancelled again",
                self._name,
                message_id,
                self.overdue,
                extra={"action": "handler.overdue", "handler": self._name, "message_id": message_id},
            )
            timer = loop.call_later(_CANCEL_AGAIN, insist)
            task.cancel()

        async with asyncio.timeout(self._seconds):
            timer = loop.call_later(self._seconds + _CANCEL_AGAIN, insist)
            try:
                yield
            finally:
                timer.cancel()
                for _ in range(self._ignored.pop(task, 0)):
                    task.uncancel()  # only the first one is the timeout's
