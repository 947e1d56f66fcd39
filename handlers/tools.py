"""What the handlers of one process share."""

from collections.abc import Callable
from dataclasses import dataclass, field

from dishka import AsyncContainer
from sqlalchemy.ext.asyncio import AsyncEngine

from events.bus import Bus
from events.clock import Clock
from events.codec import Limits
from events.database import room_for_long
from events.ids import Ids, Random
from events.outbox import Outbox
from handlers.fence import Fence
from handlers.keys import KeyLocks
from handlers.limits import Isolation, Slots
from handlers.retries import Retries


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
