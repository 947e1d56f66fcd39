"""Limits on how much runs at a time, and how fast: slots, a pace, one at a time per key, one quite alone."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf

from events.clock import Clock

_LOOK_EVERY = 0.5  # seconds: so soon a change of the rate is seen by who waits
_BURST = 0.05  # seconds' worth of messages that may come at once: sleeping for less is not worth its cost


class Slots:
    """A semaphore whose limit can change while it is used."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def taken(self) -> int:
        """How many are taken."""
        return self._taken

    @property
    def limit(self) -> int:
        """How many there are. A smaller limit takes effect as slots are released."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = limit
        self._wake()

    async def acquire(self) -> None:
        """Take a slot; wait until there is one."""
        while self._taken >= self._limit:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except BaseException:
                self._wake()  # it may have been our turn
                raise
        self._taken += 1

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Run the block with a slot."""
        await self.acquire()
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Give a slot back."""
        self._taken -= 1
        self._wake()

    def _wake(self) -> None:
        free = self._limit - self._taken
        while free > 0 and self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                free -= 1


class Pace:
    """Lets so many pass a second, evenly (GCRA: ITU-T I.371, annex A; here with delays instead of refusals).

    Args:
        clock: measures and sleeps.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = -inf  # when the last one passed, or would have without a burst
        self.rate: float | None = None  # it may change while somebody waits

    async def keep(self) -> None:
        """Return when one more may pass."""
        while self.rate is not None:
            now = self._clock.monotonic()
            at = max(self._last + 1 / self.rate, now - _BURST)
            if at <= now:
                self._last = at
                return
            await self._clock.sleep(min(at - now, _LOOK_EVERY))


class OneAtATime:
    """Locks by key that nobody has to tidy up."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        """Run the block when no other block for `key` runs, in the order of asking."""
        if (queue := self._queues.get(key)) is None:
            self._queues[key] = deque()
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            queue.append(turn)
            try:
                await turn
            except BaseException:
                if turn in queue:
                    queue.remove(turn)
                elif turn.done() and not turn.cancelled():  # it was our turn: hand it on
                    self._next(key)
                raise
        try:
            yield
        finally:
            self._next(key)

    def _next(self, key: str) -> None:
        queue = self._queues[key]
        while queue:
            turn = queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._queues[key]


class Isolation:
    """Many run side by side, or one quite alone: a message that may kill the process shall take nobody with it."""

    def __init__(self) -> None:
        self._running = 0
        self._alone = False
        self._kept_waiting = 0
        self._changed = asyncio.Condition()

    @property
    def is_taken(self) -> bool:
        """Whether somebody is alone, or waits for it."""
        return self._alone

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Run the block side by side with others, and not while somebody is alone or waits for it."""
        if self._alone:
            async with self._changed:
                self._kept_waiting += 1
                try:
                    await self._changed.wait_for(lambda: not self._alone)
                    self._running += 1
                finally:
                    self._kept_waiting -= 1
                    self._changed.notify_all()
        else:
            self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if self._alone:
                async with self._changed:
                    self._changed.notify_all()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Run the block while no other runs; those that were kept waiting by somebody alone go first."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._alone and not self._kept_waiting)
            self._alone = True
            try:
                await self._changed.wait_for(lambda: self._running == 0)
            except BaseException:
                self._alone = False
                self._changed.notify_all()
                raise
        try:
            yield
        finally:
            async with self._changed:
                self._alone = False
                self._changed.notify_all()
