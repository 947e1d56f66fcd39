"""What the handlers of one process share."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from dishka import AsyncContainer
from sqlalchemy.ext.asyncio import AsyncEngine

from events.bus import Bus
from events.clock import Clock
from events.codec import Limits
from events.database import is_transient, room_for_long
from events.ids import Ids, Random
from events.outbox import Outbox
from events.service import is_cancelled
from handlers.fence import Fence
from handlers.keys import KeyLocks
from handlers.limits import Isolation, Slots
from handlers.retries import Retries

logger = logging.getLogger(__name__)

_DATABASE_PAUSE = 0.5
_T = TypeVar("_T")


def _nobody() -> None:
    """Nobody looks."""


@dataclass(slots=True)
class Tools:
    """What the handlers of one process share.

    Attributes:
        engine, bus, outbox: where outcomes, deliveries and messages go.
        container: makes what handlers ask for.
        clock, ids, random: the ports for time, names and chance.
        limits: the sizes that are checked before anything is parsed.
        fence: knows which compensations can be judged here.
        retries: where messages wait to be tried again.
        keys: messages of one key, one at a time.
        isolation: many run side by side, or one quite alone.
        sessions: the connections that handlers may hold while they run; some are left for all else.
        look_again: to be called when a waiting message may be due, or there is room for one.
    """

    engine: AsyncEngine
    bus: Bus
    outbox: Outbox
    container: AsyncContainer | None
    clock: Clock
    ids: Ids
    random: Random
    limits: Limits
    fence: Fence
    retries: Retries
    keys: KeyLocks
    isolation: Isolation = field(default_factory=Isolation)
    sessions: Slots = field(init=False)
    look_again: Callable[[], None] = _nobody

    def __post_init__(self) -> None:
        self.sessions = Slots(room_for_long(self.engine))

    async def until_database_answers(self, handler: str, work: Callable[[], Awaitable[_T]]) -> _T:
        """Do `work`; while the database is away, or wants it done again, do it again. No attempt is burned."""
        while True:
            try:
                return await work()
            except Exception as error:
                if is_cancelled() or not is_transient(error):
                    raise  # a driver's clean-up may have turned our cancel into an error of its own
                logger.warning(
                    "%s waits for the database: %s",
                    handler,
                    error,
                    extra={"action": "handler.database_away"},
                )
            await self.clock.sleep(_DATABASE_PAUSE)
