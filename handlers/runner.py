"""Runs one handler in one process: takes batches, skips duplicates, runs, commits in groups, acknowledges.

The life of a message here: taken from the queue, looked up in the inbox, run, recorded together with its
reply and its events in one transaction, handed to the bus, acknowledged. A handler that asks for an
`AsyncSession` has a transaction of its own, in which its effect is recorded, too; all others share one
transaction with whatever else has finished by then.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import TypeVar
from uuid import UUID

from dishka import AsyncContainer
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from events.bulk import together
from events.bus import Bus, Consumer
from events.clock import Clock
from events.codec import Limits, Readable
from events.database import is_transient, single_statements, transaction
from events.dead_letters import DeadLetter, bury
from events.envelope import Envelope, Result
from events.errors import CoordinatorError
from events.failpoints import failpoint
from events.ids import Ids, Random
from events.intake import Intake, Item, completed_by, settle
from events.message import Message
from events.outbox import AfterCommit, Outbound, Outbox, recorded_reply
from events.registry import Registry
from events.service import Supervisor, cancel_all, is_cancelled
from handlers.context import Context
from handlers.definition import Handler
from handlers.execution import Execution, Outcome, Progress
from handlers.fence import BARRED, Fence, is_barred
from handlers.inbox import OF_SAGAS, Inbox, Recorded

logger = logging.getLogger(__name__)

_BATCH = 256
_PREFETCH = 16
_DATABASE_PAUSE = 0.5

T = TypeVar("T")


class _LostRaceError(Exception):
    """Another process has recorded the message meanwhile: what was done here must be rolled back."""


class _HandlersOwnError(Exception):
    """Not the database's: a third party that is away or slow burns an attempt, as any other failure."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class HandlerRunner:
    """Runs `handler` until stopped."""

    def __init__(
        self,
        handler: Handler,
        *,
        registry: Registry,
        source: str,
        engine: AsyncEngine,
        bus: Bus,
        outbox: Outbox,
        container: AsyncContainer | None,
        clock: Clock,
        ids: Ids,
        random: Random,
        limits: Limits,
        fence: Fence,
    ) -> None:
        self._handler = handler
        self._execution = Execution(handler, registry, source=source, container=container, clock=clock, random=random)
        self._engine = engine
        self._single = single_statements(engine)
        self._bus = bus
        self._outbox = outbox
        self._inbox = Inbox(engine, handler)
        self._fence = fence
        self._clock = clock
        self._ids = ids
        self._limits = limits
        self._intake = Intake(limits)
        self._slots = asyncio.Semaphore(handler.concurrency)
        self._running: dict[UUID, list[Item]] = {}  # keys in work, each with duplicates that wait for it
        self._released: set[UUID] = set()  # keys that were in work when the batch was looked up, and are no more
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished: deque[Outcome] = deque()
        self._to_commit = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._taking = Supervisor(clock)
        self._committing = Supervisor(clock)
        self._consumer: Consumer | None = None

    @property
    def handler(self) -> Handler:
        """What runs here."""
        return self._handler

    async def start(self) -> None:
        """Start to consume; the queue must have been declared."""
        name = self._handler.name
        self._taking.start(f"handler.{name}.take", self._take_loop)
        self._committing.start(f"handler.{name}.commit", self._commit_loop)
        self._consumer = await self._bus.consume(self._handler.queue.name, self._intake.deliver, prefetch=_PREFETCH)

    async def stop(self, grace: float) -> None:
        """Take no more, let what runs end within `grace` seconds, commit it; the rest goes back to the queue."""
        if self._consumer is not None:
            await self._consumer.cancel()
            self._consumer = None
        await self._taking.stop()
        try:
            async with asyncio.timeout(grace):
                if self._tasks:
                    await asyncio.wait(self._tasks)
                await self._idle.wait()
        except TimeoutError:
            logger.warning(
                "%s: %d messages were not finished in %g s; they are handed back",
                self._handler.name,
                len(self._tasks),
                grace,
                extra={"action": "handler.handed_back", "handler": self._handler.name},
            )
        await cancel_all(self._tasks)
        await self._committing.stop()

    # Taking

    async def _take_loop(self) -> None:
        while True:
            items = await self._intake.take(_BATCH)
            started = 0
            self._released.clear()
            try:
                recorded = await self._find_recorded(items)
                for item in items:
                    await self._begin(item, recorded)
                    started += 1
            finally:  # an error or the end: what was not begun is not forgotten
                self._intake.put_back(items[started:])

    async def _find_recorded(self, items: Sequence[Item]) -> Mapping[UUID, Recorded]:
        envelopes = [item.part.envelope for item in items if isinstance(item.part, Readable)]
        keys = [envelope.key for envelope in envelopes]
        keys += [command for envelope in envelopes if (command := self._fence.undone_by(envelope)) is not None]
        if not keys:
            return {}
        return await self._until_database_answers(lambda: self._inbox.find(keys))

    async def _begin(self, item: Item, recorded: Mapping[UUID, Recorded]) -> None:
        part = item.part
        if not isinstance(part, Readable):
            self._finish(self._execution.reject(item, part.error))
            return
        envelope = part.envelope
        key = envelope.key
        if known := recorded.get(key):
            answer = self._execution.refuse(item, envelope) if is_barred(known) else self._repeat(item, envelope, known)
            self._finish(answer)
        elif key in self._running:
            self._running[key].append(item)
        elif key in self._released:  # it may have been recorded after we looked: look again
            self._intake.put_back([item])
        elif self._fence.has_nothing_to_undo(envelope, recorded):
            command = self._fence.undone_by(envelope)
            self._running[key] = []
            self._finish(self._execution.undo_nothing(item, envelope, None if command in recorded else command))
        else:
            await self._slots.acquire()
            self._running[key] = []
            task = asyncio.create_task(self._run(item, envelope))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _repeat(self, item: Item, envelope: Envelope, known: Recorded) -> Outcome:
        """Answer a duplicate with the recorded reply."""
        logger.info(
            "%s has handled %s before; its reply is sent again",
            self._handler.name,
            envelope.id,
            extra={"action": "handler.duplicate", "handler": self._handler.name, "message_id": envelope.id},
        )
        outcome = Outcome(item, None, Result.SUCCEEDED)
        if known.reply is not None and known.reply_to is not None:
            outcome.messages.append(recorded_reply(known.reply, known.reply_to))
        return outcome

    # Running

    async def _run(self, item: Item, envelope: Envelope) -> None:
        once = self._once_in_transaction if self._handler.session_parameter else self._once
        try:
            outcome = await self._execution.run(
                item, envelope, lambda message, context: once(item, envelope, message, context)
            )
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a driver that lost its connection may cancel us
            if is_cancelled():
                raise
            logger.exception(
                "%s could not settle %s and tries again",
                self._handler.name,
                envelope.id,
                exc_info=error,
                extra={"action": "handler.interrupted", "handler": self._handler.name, "message_id": envelope.id},
            )
            await self._clock.sleep(_DATABASE_PAUSE)
            self._release(envelope.key)
            self._intake.put_back([item])
            return
        finally:
            self._slots.release()
        if outcome.progress is Progress.PENDING:
            self._finish(outcome)
            return
        self._release(envelope.key)
        if outcome.progress is Progress.LOST:
            self._intake.put_back([item])

    async def _once(self, item: Item, envelope: Envelope, message: Message, context: Context) -> Outcome:
        outcome = await self._execution.call(item, envelope, message, context, None)
        await failpoint("handler.after_run")
        return outcome

    async def _once_in_transaction(self, item: Item, envelope: Envelope, message: Message, context: Context) -> Outcome:
        try:
            return await self._until_database_answers(lambda: self._transact(item, envelope, message, context))
        except _HandlersOwnError as own:
            error = own.error
        raise error

    async def _transact(self, item: Item, envelope: Envelope, message: Message, context: Context) -> Outcome:
        context.published.clear()
        try:
            async with transaction(self._engine) as connection:
                async with AsyncSession(bind=connection, expire_on_commit=False) as session:
                    outcome = await self._call(item, envelope, message, context, session)
                    await session.flush()
                    kept, after_commit = await self._store(connection, [outcome], has_run=False)
                if not kept:
                    raise _LostRaceError  # noqa: TRY301  # it must pass the transaction to roll it back
                await failpoint("handler.before_commit")
        except _LostRaceError:
            return Outcome(item, envelope, Result.SUCCEEDED, progress=Progress.LOST)
        await failpoint("handler.after_commit")
        after_commit()
        await settle([item])
        outcome.progress = Progress.COMMITTED
        return outcome

    async def _call(
        self, item: Item, envelope: Envelope, message: Message, context: Context, session: AsyncSession
    ) -> Outcome:
        try:
            return await self._execution.call(item, envelope, message, context, session)
        except SQLAlchemyError:
            raise
        except Exception as error:
            raise _HandlersOwnError(error) from error

    # Committing

    def _finish(self, outcome: Outcome) -> None:
        self._finished.append(outcome)
        self._idle.clear()
        self._to_commit.set()

    def _release(self, key: UUID) -> None:
        """The message of `key` is no longer in work; duplicates that waited for it are looked up again."""
        self._released.add(key)
        if waiting := self._running.pop(key, None):
            self._intake.put_back(waiting)

    async def _commit_loop(self) -> None:
        while True:
            await self._to_commit.wait()
            self._to_commit.clear()
            while self._finished:
                outcomes = [self._finished.popleft() for _ in range(min(len(self._finished), _BATCH))]
                try:
                    await self._commit(outcomes)
                except BaseException:  # not forgotten: what of it was committed is found in the inbox
                    self._finished.extendleft(outcome for outcome in reversed(outcomes) if not outcome.item.settled)
                    self._to_commit.set()
                    raise
            self._idle.set()

    async def _commit(self, outcomes: list[Outcome]) -> None:
        try:
            kept, after_commit = await self._until_database_answers(lambda: self._commit_together(outcomes))
        except Exception as error:  # noqa: BLE001  # whatever it is, it must not stop the others
            if len(outcomes) > 1:  # one of them spoils the batch: find it
                for outcome in outcomes:
                    await self._commit([outcome])
                return
            self._spoil(outcomes[0], error)
            await self._commit(outcomes)
            return
        await failpoint("handler.after_commit")
        after_commit()
        await settle([outcome.item for outcome in kept])
        for outcome in outcomes:
            if outcome.envelope is not None:
                self._release(outcome.envelope.key)
        lost = {id(outcome) for outcome in outcomes} - {id(outcome) for outcome in kept}
        self._intake.put_back([outcome.item for outcome in outcomes if id(outcome) in lost])

    def _spoil(self, outcome: Outcome, error: Exception) -> None:
        """Turn an outcome that cannot be stored into one that can: without its events, then without its reply."""
        logger.error(
            "%s: the outcome of a message cannot be stored: %r",
            self._handler.name,
            error,
            extra={"action": "handler.spoilt", "handler": self._handler.name},
        )
        if outcome.dead is not None and not outcome.messages:
            raise error
        code = error.code if isinstance(error, CoordinatorError) else "failed"
        spoilt = self._execution.fail(outcome.item, outcome.envelope, code, repr(error), attempts=1)
        if outcome.dead is None:
            outcome.messages, outcome.reply, outcome.dead = spoilt.messages, spoilt.reply, spoilt.dead
        else:
            outcome.messages, outcome.reply = [], None

    async def _commit_together(self, outcomes: list[Outcome]) -> tuple[list[Outcome], AfterCommit]:
        if self._engine.dialect.name == "postgresql":
            try:
                return outcomes, await self._commit_in_one_statement(outcomes)
            except IntegrityError:
                pass  # somebody has recorded one of them since it was looked up: find out which
        async with transaction(self._engine) as connection:
            result = await self._store(connection, outcomes, has_run=True)
            await failpoint("handler.before_commit")
        return result

    async def _commit_in_one_statement(self, outcomes: list[Outcome]) -> AfterCommit:
        """Record outcomes that nobody has recorded: inbox, dead letters and outbox in one trip to the database."""
        now = self._clock.now()
        async with self._single.connect() as connection, together(connection):
            await self._inbox.record_new(connection, [*self._barred(outcomes), *self._recorded(outcomes)], now)
            after_commit = await self._store_consequences(connection, outcomes, now)
            await failpoint("handler.before_commit")
        return after_commit

    async def _store(
        self, connection: AsyncConnection, outcomes: Sequence[Outcome], *, has_run: bool
    ) -> tuple[list[Outcome], AfterCommit]:
        """Record `outcomes` in the open transaction: inbox, dead letters, outbox. Returns those that were kept.

        `has_run` says that what the handler did stays done even if the transaction is rolled back. Then a command
        that was barred while it ran is recorded all the same: its reply comes late, and it is undone once more.
        """
        now = self._clock.now()
        bars = self._barred(outcomes)
        barred = await self._inbox.record(connection, bars, now) if bars else set()
        judged = [outcome for outcome in outcomes if outcome.bars is None or outcome.bars in barred]
        new = self._recorded(judged)
        fresh = await self._inbox.record(connection, new, now) if new else set()
        if has_run and len(fresh) < len(new):
            late = [entry for entry in new if entry.key not in fresh]
            fresh |= await self._inbox.take_over(connection, late, BARRED)
        kept = [outcome for outcome in judged if outcome.envelope is None or outcome.envelope.key in fresh]
        return kept, await self._store_consequences(connection, kept, now)

    def _barred(self, outcomes: Sequence[Outcome]) -> list[Recorded]:
        return [Recorded(outcome.bars, OF_SAGAS, BARRED, None) for outcome in outcomes if outcome.bars is not None]

    def _recorded(self, outcomes: Sequence[Outcome]) -> list[Recorded]:
        return [
            Recorded(
                outcome.envelope.key,
                self._inbox.consumer_of(outcome.envelope),
                outcome.reply.encode(self._limits) if outcome.reply else None,
                outcome.reply.address.key if outcome.reply else None,
            )
            for outcome in outcomes
            if outcome.envelope is not None
        ]

    async def _store_consequences(
        self, connection: AsyncConnection, outcomes: Sequence[Outcome], now: datetime
    ) -> AfterCommit:
        letters: list[DeadLetter] = [outcome.dead for outcome in outcomes if outcome.dead is not None]
        if letters:
            await bury(connection, letters, ids=self._ids, now=now)
        messages: list[Outbound] = [message for outcome in outcomes for message in outcome.messages]
        settling = completed_by(outcome.item for outcome in outcomes)
        return await self._outbox.write(connection, messages, settling)

    async def _until_database_answers(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do `work`; while the database is away, or wants it done again, do it again. No attempt is burned."""
        while True:
            try:
                return await work()
            except Exception as error:
                if is_cancelled() or not is_transient(error):
                    raise  # a driver's clean-up may have turned our cancel into an error of its own
                logger.warning(
                    "%s waits for the database: %s",
                    self._handler.name,
                    error,
                    extra={"action": "handler.database_away"},
                )
            await self._clock.sleep(_DATABASE_PAUSE)
