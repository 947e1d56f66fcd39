"""One at a time per key, in all processes: locks that a process holds on its messages' keys.

Within a process a queue per key keeps the order of arrival. Between processes it is an advisory lock of PostgreSQL
(manual, section 13.3.5), held by a connection of its own: it ends with the process, however that ends. Through a
pooler that hands out connections per transaction such locks mean nothing; connect past it.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import blake2b

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from events.clock import Clock
from events.database import is_transient, single_statements
from events.ids import Random
from events.service import is_cancelled
from handlers.limits import OneAtATime

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 0.5


class KeyLocks:
    """The keys that are in work in this process.

    Args:
        engine: the database that all processes share; on SQLite there is only one process.
        clock: paces looking for a key that another process holds.
        random: spreads it.
    """

    def __init__(self, engine: AsyncEngine, *, clock: Clock, random: Random) -> None:
        self._engine = single_statements(engine)
        self._clock = clock
        self._random = random
        self._local = OneAtATime()
        self._shared = engine.dialect.name == "postgresql"
        self._connection: AsyncConnection | None = None
        self._in_use = asyncio.Lock()

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        """Run the block while nobody else runs one for `key`."""
        async with self._local.of(key):
            if not self._shared:
                yield
                return
            number = int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), signed=True)
            await self._lock(number)
            try:
                yield
            finally:
                await asyncio.shield(self._unlock(number))

    async def close(self) -> None:
        """Give all keys up."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.invalidate()  # not back to the pool: the locks belong to its session
            await connection.close()

    async def _lock(self, number: int) -> None:
        pause = _FIRST_PAUSE
        while not await self._ask("SELECT pg_try_advisory_lock($1)", number):
            await self._clock.sleep(self._random.uniform(0, pause))
            pause = min(_LONGEST_PAUSE, 2 * pause)

    async def _unlock(self, number: int) -> None:
        try:
            await self._ask("SELECT pg_advisory_unlock($1)", number)
        except Exception as error:  # the message is done; the session, if it is lost, has given its locks up
            if is_cancelled() or not is_transient(error):
                raise
            logger.warning("a key is given up with its session: %s", error, extra={"action": "handlers.key_lost"})

    async def _ask(self, statement: str, number: int) -> bool:
        async with self._in_use:
            if self._connection is None:
                self._connection = await self._engine.connect()
            try:
                return bool((await self._connection.exec_driver_sql(statement, (number,))).scalar())
            except BaseException:  # whatever it was, nobody knows what this session holds
                await self.close()
                raise
