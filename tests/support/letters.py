"""What tests of dead letters share: a handler that is out of order, and letters as operators see them."""

from typing import Any
from uuid import UUID, uuid4

from events.dead_letters import BUS
from events.envelope import Direction, Envelope, SagaLink
from events.registry import Registry
from handlers import Retry, handles
from handlers.definition import Handler
from handlers.letters import Letter, Query
from handlers.replay import DeadLetters
from handlers.replay_plan import Planned
from tests.support.flows import RefundCard, Stage, enveloped

ONCE = Retry(attempts=1)
ALL = Query()


class Service:
    """A handler that is out of order until it is mended, and what it was asked."""

    def __init__(self) -> None:
        self.broken = True
        self.broken_for: set[str] = set()
        self.asked: list[str] = []

        @handles(RefundCard, retry=ONCE)
        async def refund_card(command: RefundCard) -> None:
            self.asked.append(command.order)
            if self.broken or command.order in self.broken_for:
                raise ValueError(f"no refund for order {command.order}")

        self.handler = refund_card


def letters_of(stage: Stage, *handlers: Handler) -> DeadLetters:
    """The letters as an operator sees them who names an application of `handlers`, or none."""
    known = {handler.name: Registry([handler.message]) for handler in handlers}
    consumers = {BUS: Registry(), **known} if known else None
    return DeadLetters(stage.engine, clock=stage.clock, ids=stage.ids, consumers=consumers)


def undo(order: str, saga: UUID | None = None) -> Envelope:
    return enveloped(RefundCard(order=order), saga=SagaLink(saga or uuid4(), f"charge{order}", Direction.UNDO, 1))


async def replayed(letters: DeadLetters, query: Query = ALL, **how: Any) -> list[Planned]:
    return [planned async for planned in letters.replay(query, **{"by": "ada", "why": "mended", **how})]


async def planned(letters: DeadLetters, query: Query = ALL, **how: Any) -> list[Planned]:
    return [each async for each in letters.plan(query, **how)]


async def oldest_first(letters: DeadLetters, query: Query = ALL, *, limit: int = 50) -> list[Letter]:
    return list(reversed(await letters.find(query, limit=limit)))
