"""What the handlers of one process share."""

from collections.abc import Callable
from dataclasses import dataclass, field

from dishka import AsyncContainer
from sqlalchemy.ext.asyncio import AsyncEngine

from events.bus import Bus
from events.clock import Clock
from events.codec import Limits
from events.ids import Ids, Random
from events.outbox import Outbox
from handlers.fence import Fence
from handlers.keys import KeyLocks
from handlers.limits import Isolation
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
    look_again: Callable[[], None] = _nobody
