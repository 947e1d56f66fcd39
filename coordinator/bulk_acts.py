"""One act on many sagas: those that a query means, page by page, paced, each refused or done by itself."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from coordinator.decision import Acted
from coordinator.engine import Engine
from coordinator.instance import Instance
from coordinator.search import Query
from coordinator.store import Store
from events.clock import Clock
from events.errors import ConfigurationError, CoordinatorError
from handlers.limits import Pace

_PAGE = 100
_AHEAD = 0.5  # seconds: who is read earlier than that before his turn has often moved on by then


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one saga.

    Attributes:
        before: the saga as it was looked at.
        after: as it is now; the same if the act was refused.
        refused: why it was.
    """

    before: Instance
    after: Instance
    refused: CoordinatorError | None = None


class BulkAct:
    """An act on all sagas that a query means and that were started before it began.

        async for outcome in operator.act_on(Query(saga="place_order"), Verb.CANCEL, by="ada", why="sold out"):
            ...

    Each saga must be at the revision at which it was found, or the act is refused for it. What was returned is
    committed. Who stops early, by `stop` or a crash, runs it again: what is done is not found again, or refused.

    Args:
        engine: writes what follows.
        store: where the sagas are.
        clock: paces.
        query: which sagas.
        act: what is done to each; its revision and time are filled in.
        rate: how many a second at most; None for as fast as it goes.
        dry_run: say what would be done, and change nothing.

    Raises:
        ConfigurationError: the query means all sagas there are, or the rate makes no sense.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        clock: Clock,
        *,
        query: Query,
        act: Acted,
        rate: float | None = None,
        dry_run: bool = False,
    ) -> None:
        if not query.is_narrow:
            raise ConfigurationError("say which sagas are meant: by their saga, status, key, step, time or state")
        if rate is not None and not rate > 0:
            raise ConfigurationError("a rate is more than 0 sagas a second")
        self._engine = engine
        self._store = store
        self._query = query
        self._act = act
        self._dry_run = dry_run
        self._pace = Pace(clock)
        self._pace.rate = None if dry_run else rate
        self._page = _PAGE if self._pace.rate is None else min(_PAGE, max(1, int(self._pace.rate * _AHEAD)))
        self.stopped = False

    def stop(self) -> None:
        """Stop after what is under way is committed, or at once while it waits for its pace."""
        self.stopped = True
        self._pace.rate = None

    async def __aiter__(self) -> AsyncIterator[Outcome]:
        """Act, and return what became of each saga, oldest first."""
        await self._store.clock.calibrate()
        query, last = self._until(self._store.clock.now()), UUID(int=0)
        while page := await self._store.page(query, after=last, limit=self._page):
            for _ in page:
                await self._pace.keep()
            if self.stopped:
                return
            for outcome in await self._act_on(page):
                yield outcome
            last = page[-1].id

    async def _act_on(self, page: Sequence[Instance]) -> list[Outcome]:
        now = self._store.clock.now()
        acts = {each.id: replace(self._act, now=now, revision=each.revision) for each in page}
        found = await self._engine.act_on_all(acts, dry_run=self._dry_run)
        return [
            Outcome(each, each, after)
            if isinstance(after := found[each.id], CoordinatorError)
            else Outcome(each, after)
            for each in page
        ]

    def _until(self, now: datetime) -> Query:
        """Leave out what is started from now on: the end would never come."""
        until = self._query.until
        return replace(self._query, until=now if until is None else min(until, now))
