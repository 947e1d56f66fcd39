"""Recording outcomes: inbox, dead letters, tries to come and outbox, in one transaction."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from events.bulk import together
from events.clock import Clock
from events.codec import Limits
from events.database import single_statements, transaction
from events.dead_letters import bury
from events.envelope import Envelope
from events.errors import StaleRowError
from events.failpoints import failpoint
from events.ids import Ids
from events.intake import completed_by
from events.outbox import AfterCommit, Outbox
from handlers.fence import MARKS, TRIED, UNTRIED
from handlers.inbox import OF_SAGAS, Inbox, Recorded
from handlers.outcome import Outcome
from handlers.retries import Retries, Waiting, row_of


class Recorder:
    """Commits the outcomes of one handler.

    Args:
        engine: the database.
        inbox: the inbox of the handler.
        retries: where messages wait to be tried again.
        outbox: where messages go that the outcomes cause.
        clock: dates the records.
        ids: names dead letters.
        limits: the largest reply.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        inbox: Inbox,
        retries: Retries,
        outbox: Outbox,
        clock: Clock,
        ids: Ids,
        limits: Limits,
    ) -> None:
        self._engine = engine
        self._single = single_statements(engine)
        self._inbox = inbox
        self._retries = retries
        self._outbox = outbox
        self._clock = clock
        self._ids = ids
        self._limits = limits

    async def commit(self, outcomes: Sequence[Outcome]) -> tuple[Sequence[Outcome], AfterCommit]:
        """Record `outcomes` in a transaction of their own. Returns those that nobody had recorded before."""
        doubtful = any(outcome.doubts is not None for outcome in outcomes)
        if self._engine.dialect.name == "postgresql" and not doubtful:
            try:
                return outcomes, await self._commit_in_one_statement(outcomes)
            except (IntegrityError, StaleRowError):
                pass  # somebody has recorded one of them since it was looked up, or tries it: find out which
        async with transaction(self._engine) as connection:
            result = await self.store(connection, outcomes, has_run=True)
            await failpoint("handler.before_commit")
        return result

    async def _commit_in_one_statement(self, outcomes: Sequence[Outcome]) -> AfterCommit:
        """Record outcomes that nobody has recorded, in one trip to the database."""
        now = self._clock.now()
        async with self._single.connect() as connection, together(connection):
            await self._inbox.record_new(connection, [*_barred(outcomes), *self._handled(outcomes)], now)
            after_commit = await self._store_consequences(connection, outcomes, now)
            await failpoint("handler.before_commit")
        return after_commit

    async def store(
        self, connection: AsyncConnection, outcomes: Sequence[Outcome], *, has_run: bool
    ) -> tuple[list[Outcome], AfterCommit]:
        """Record `outcomes` in the open transaction. Returns those that nobody had recorded before, or tries now.

        `has_run` says that what the handler did stays done even if the transaction is rolled back. Then a command
        that was barred while it ran is recorded all the same: its reply comes late, and it is undone once more.
        """
        now = self._clock.now()
        bars = _barred(outcomes)
        barred = await self._inbox.record(connection, bars, now) if bars else set()
        judged = [outcome for outcome in outcomes if outcome.bars is None or outcome.bars in barred]
        new = self._handled(judged)
        fresh = await self._inbox.record(connection, new, now) if new else set()
        if has_run and len(fresh) < len(new):
            late = [entry for entry in new if entry.key not in fresh]
            fresh |= await self._inbox.take_over(connection, late, MARKS)
        await self._doubt(connection, [outcome.doubts for outcome in judged if outcome.doubts is not None], now)
        kept = [outcome for outcome in judged if outcome.handled is None or outcome.handled.key in fresh]
        if postponed := [row for outcome in kept if outcome.again and (row := row_of(outcome.item))]:
            held = {row.id for row in await self._retries.still_held(connection, postponed)}
            passed_on = {row.id for row in postponed} - held
            kept = [outcome for outcome in kept if outcome.again is None or outcome.again.id not in passed_on]
        return kept, await self._store_consequences(connection, kept, now)

    async def call_off(self, command: UUID) -> None:
        """Bar a command that may have been done, and let it wait no more. In a transaction of its own."""
        async with transaction(self._engine) as connection:
            await self._doubt(connection, [command], self._clock.now())
            await self._retries.call_off(connection, command)

    async def _doubt(self, connection: AsyncConnection, commands: Sequence[UUID], now: datetime) -> None:
        if not commands:
            return
        marks = [Recorded(command, OF_SAGAS, TRIED, None) for command in commands]
        fresh = await self._inbox.record(connection, marks, now)
        await self._inbox.take_over(connection, [mark for mark in marks if mark.key not in fresh], [UNTRIED])

    def _handled(self, outcomes: Sequence[Outcome]) -> list[Recorded]:
        return [self._recorded(outcome, outcome.handled) for outcome in outcomes if outcome.handled is not None]

    def _recorded(self, outcome: Outcome, handled: Envelope) -> Recorded:
        row = row_of(outcome.item)
        replayed = row is not None and row.dead_letter_id is not None  # an operator may have edited it
        return Recorded(
            handled.key,
            self._inbox.consumer_of(handled),
            outcome.reply.encode(self._limits) if outcome.reply else None,
            outcome.reply.address.key if outcome.reply else None,
            None if replayed else handled.content,
        )

    async def _store_consequences(
        self, connection: AsyncConnection, outcomes: Sequence[Outcome], now: datetime
    ) -> AfterCommit:
        letters = [outcome.dead for outcome in outcomes if outcome.dead is not None]
        if letters:
            await bury(connection, letters, ids=self._ids, now=now)
        await self._store_tries(connection, outcomes)
        messages = [message for outcome in outcomes for message in outcome.messages]
        settling = completed_by(outcome.item for outcome in outcomes)
        return await self._outbox.write(connection, messages, settling)

    async def _store_tries(self, connection: AsyncConnection, outcomes: Sequence[Outcome]) -> None:
        """Bring the rows of messages that are tried again up to date; those of all others go."""
        added: list[Waiting] = []
        postponed: list[Waiting] = []
        over: list[Waiting] = []
        for outcome in outcomes:
            row = row_of(outcome.item)
            if outcome.again is not None:
                (postponed if row else added).append(outcome.again)
            elif row is not None:
                over.append(row)
        if added:
            await self._retries.add(connection, added)
        if postponed:
            await self._retries.postpone(connection, postponed)
        if over:
            await self._retries.remove(connection, over)


def _barred(outcomes: Sequence[Outcome]) -> list[Recorded]:
    return [Recorded(outcome.bars, OF_SAGAS, UNTRIED, None) for outcome in outcomes if outcome.bars is not None]
