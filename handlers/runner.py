"""Runs one handler in one process: takes batches, skips duplicates, runs, commits in groups, acknowledges.

The life of a message here: taken from the queue, looked up in the inbox, run, recorded together with its
reply and its events in one transaction, handed to the bus, acknowledged. A handler that asks for an
`AsyncSession` has a transaction of its own, in which its effect is recorded, too; all others share one
transaction with whatever else has finished by then. A message that fails, or that comes a second time, leaves the
queue for the table of those that are tried again, and comes here from there.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from uuid import UUID

from events.codec import Readable
from events.envelope import Envelope
from events.errors import CoordinatorError
from events.failpoints import failpoint
from events.intake import Intake, Item, settle
from events.message import Message
from events.registry import Registry
from events.service import Supervisor, cancel_all, is_cancelled
from handlers.answers import Answers
from handlers.breaker import Circuit, Signal
from handlers.context import Context
from handlers.definition import Handler
from handlers.execution import Execution
from handlers.flow import Flow
from handlers.inbox import NOTHING, Inbox, Known
from handlers.limits import Pace, Slots
from handlers.outcome import Outcome, Progress
from handlers.own_transaction import OwnTransaction
from handlers.places import Places
from handlers.recording import Recorder
from handlers.retries import Parked, Waiting, row_of
from handlers.tools import Tools

logger = logging.getLogger(__name__)

_BATCH = 256
_DATABASE_PAUSE = 0.5


class HandlerRunner:
    """Runs `handler` until stopped.

    Args:
        handler: what runs.
        registry: reads its messages.
        source: who speaks, in what it sends.
        tools: what it shares with the other handlers of the process.
        circuit: the breaker of its dependency.
    """

    def __init__(
        self, handler: Handler, *, registry: Registry, source: str, tools: Tools, circuit: Circuit | None = None
    ) -> None:
        self.handler = handler
        self.answers = Answers(handler, source=source, tools=tools)
        self.execution = Execution(handler, registry, self.answers, tools=tools, circuit=circuit)
        self._tools = tools
        self._circuit = circuit
        self._clock = tools.clock
        self._inbox = Inbox(tools.engine, handler)
        self._recorder = Recorder(
            tools.engine,
            inbox=self._inbox,
            retries=tools.retries,
            outbox=tools.outbox,
            clock=tools.clock,
            ids=tools.ids,
            limits=tools.limits,
        )
        self._intake = Intake(tools.limits)
        self.parked: dict[UUID, Waiting] = {}  # rows taken to be tried here, by their ids
        self.flow = Flow(
            handler.queue.name,
            self._intake,
            bus=tools.bus,
            circuit=circuit,
            give_back=self._give_back,
        )
        self.slots = Slots(handler.concurrency)
        self.pace = Pace(tools.clock)
        self._places = Places(handler, registry=registry, slots=self.slots, tools=tools)
        self._own_transaction = OwnTransaction(
            handler.name, execution=self.execution, inbox=self._inbox, recorder=self._recorder, tools=tools
        )
        self._probe: UUID | None = None  # the message that is to find out if the dependency is back
        self._running: dict[UUID, list[Item]] = {}  # keys in work, each with duplicates that wait for it
        self._released: set[UUID] = set()  # keys that were in work when the batch was looked up, and are no more
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished: deque[Outcome] = deque()
        self._to_commit = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._taking = Supervisor(tools.clock)
        self._committing = Supervisor(tools.clock)

    @property
    def failing(self) -> frozenset[str]:
        """The names of its background tasks that have failed and wait to be started again."""
        return self._taking.failing | self._committing.failing

    @property
    def room(self) -> int:
        """How many waiting messages it should be given now."""
        return max(0, 2 * self.slots.limit - len(self.parked)) if self.flow.is_free else 0

    async def start(self) -> None:
        """Start to consume; the queue must have been declared."""
        name = self.handler.name
        self._taking.start(f"handler.{name}.take", self._take_loop)
        self._committing.start(f"handler.{name}.commit", self._commit_loop)
        await self.flow.start()
        self._taking.start(f"handler.{name}.flow", self.flow.keep)

    async def stop(self, grace: float) -> None:
        """Take no more, let what runs end within `grace` seconds, commit it; the rest goes back to the queue."""
        await self.flow.stop()
        await self._taking.stop()
        await failpoint("handler.draining")
        try:
            async with asyncio.timeout(grace):
                if self._tasks:
                    await asyncio.wait(self._tasks)
                await self._idle.wait()
        except TimeoutError:
            logger.warning(
                "%s: %d messages were not finished in %g s; they are handed back",
                self.handler.name,
                len(self._tasks),
                grace,
                extra={"action": "handler.handed_back", "handler": self.handler.name},
            )
        await cancel_all(self._tasks)
        await self._committing.stop()
        await self._give_back(list(self.parked.values()))

    async def _give_back(self, rows: Sequence[Waiting]) -> None:
        for row in rows:
            self._unpark(row)
        try:
            await self._tools.retries.give_back(rows)
        except Exception as error:  # noqa: BLE001  # it must not keep the process from ending: their lease ends, too
            logger.warning("leases are not given up: %s", error, extra={"action": "handler.lease_kept"})

    # Taking

    def take(self, rows: Sequence[Waiting]) -> None:
        """Take waiting messages, to be run like those that are delivered."""
        for row in rows:
            self.parked[row.id] = row
            self._intake.deliver(Parked(row))

    async def run_at_once(self, row: Waiting) -> bool:
        """Run a waiting message past all that wait for their turn here; return when its outcome is committed.

        Returns False if it cannot be tried now, and is given back.
        """
        parked = Parked(row)
        [item] = self._intake.read(parked)
        self.parked[row.id] = row
        known = await self._find_known([item])
        if row.key in self._running:  # a duplicate is in work, and this would wait for it
            await self._abandon(item)
            return False
        await self._begin(item, known, at_once=True)
        await parked.settled.wait()
        return True

    async def _abandon(self, item: Item) -> None:
        """Give a row back whose try cannot be made now."""
        if (row := row_of(item)) is not None:
            await self._give_back([row])
            await item.delivery.requeue()

    async def _take_loop(self) -> None:
        while True:
            await self.flow.until_open()
            items = await self._intake.take(_BATCH)
            begun = 0
            self._released.clear()
            try:
                await failpoint("handler.received")
                known = await self._find_known(items)
                while begun < len(items) and await self._begin(items[begun], known):
                    begun += 1
            finally:  # an error, the end, or the flow is off: what was not begun is not forgotten
                self._intake.put_back(items[begun:])
                if begun < len(items):
                    self.flow.left_over()

    async def _find_known(self, items: Sequence[Item]) -> Known:
        envelopes = [item.part.envelope for item in items if isinstance(item.part, Readable)]
        keys = [envelope.key for envelope in envelopes]
        fence = self._tools.fence
        keys += [command for envelope in envelopes if (command := fence.undone_by(envelope)) is not None]
        if not keys:
            return NOTHING
        return await self._tools.until_database_answers(self.handler.name, lambda: self._inbox.find(keys))

    async def _begin(self, item: Item, known: Known, *, at_once: bool = False) -> bool:
        """Begin to work on `item`; return False if it must not begin now."""
        if not self.flow.is_open and not at_once:
            return False
        part = item.part
        if not isinstance(part, Readable):
            self._finish(self.answers.reject(item, part.error))
            return True
        envelope, key = part.envelope, part.envelope.key
        if (outcome := self.answers.to_known(item, envelope, known)) is not None:
            self._finish(outcome)
        elif key in self._running:
            self._running[key].append(item)
        elif key in self._released and not at_once:  # it may have been recorded after we looked: look again
            self._intake.put_back([item])
        elif (outcome := self.answers.without_run(item, part, known, self.execution.retry)) is not None:
            self._running[key] = []
            self._finish(outcome)
        else:
            doubted = self._tools.fence.doubted_by(envelope, known)
            return await self._begin_run(item, envelope, doubted, at_once=at_once)
        return True

    async def _begin_run(self, item: Item, envelope: Envelope, doubted: UUID | None, *, at_once: bool) -> bool:
        if not at_once:
            await self.pace.keep()
            if self.handler.key is None:  # others must not wait behind one that waits for its key
                await self.slots.acquire()
            if not self.flow.admit():
                if self.handler.key is None:
                    self.slots.release()
                return False
        if self._circuit is not None and self._circuit.wants_probe:
            self._circuit.tell(Signal.PROBE)
            self._probe = envelope.key
        self._running[envelope.key] = []
        task = asyncio.create_task(self._run(item, envelope, doubted, at_once=at_once))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    # Running

    async def _run(self, item: Item, envelope: Envelope, doubted: UUID | None, *, at_once: bool) -> None:
        once = self._own_transaction.run if self.handler.session_parameter else self._once
        try:
            async with self._places.of(envelope, at_once=at_once):
                if not self._may_run(envelope, at_once=at_once):
                    await self._leave(item, envelope, at_once=at_once)
                    return
                if doubted is not None:  # what it undoes is not begun from now on, and what has begun speaks for itself
                    await self._tools.until_database_answers(
                        self.handler.name, lambda: self._recorder.call_off(doubted)
                    )
                item.begun = True
                outcome = await self.execution.run(
                    item, envelope, lambda message, context: once(item, envelope, message, context)
                )
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a driver that lost its connection may cancel us
            if is_cancelled():
                raise
            logger.exception(
                "%s could not settle %s and tries again",
                self.handler.name,
                envelope.id,
                exc_info=error,
                extra={"action": "handler.interrupted", "handler": self.handler.name, "message_id": envelope.id},
            )
            await self._clock.sleep(_DATABASE_PAUSE)
            await self._leave(item, envelope, at_once=at_once)
            return
        finally:
            if self._circuit is not None and self._probe == envelope.key:
                self._probe = None
                self._circuit.tell(Signal.ABANDONED)  # unless it has found out about its dependency
        if outcome.progress is Progress.PENDING:
            self._finish(outcome)
            return
        self._release(envelope.key)
        if outcome.progress is Progress.LOST:
            self._intake.put_back([item])
        else:
            self._settled(item)

    async def _leave(self, item: Item, envelope: Envelope, *, at_once: bool) -> None:
        """Put back what nothing has come of."""
        self._release(envelope.key)
        if at_once:
            await self._abandon(item)
        else:
            self._intake.put_back([item])
            self.flow.left_over()

    def _may_run(self, envelope: Envelope, *, at_once: bool) -> bool:
        """Say whether a message may be tried: while it waited for its place the flow may have been turned off."""
        if at_once or self._probe == envelope.key:
            return not self.flow.paused
        return self.flow.is_free

    async def _once(self, item: Item, envelope: Envelope, message: Message, context: Context) -> Outcome:
        outcome = await self.execution.call(item, envelope, message, context, None)
        await failpoint("handler.after_run")
        return outcome

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

    def _settled(self, item: Item) -> None:
        """What came of `item` is committed; if it was a row, there is room for another."""
        if (row := row_of(item)) is not None:
            self._unpark(row)
            if len(self.parked) <= self.slots.limit:
                self._tools.look_again()

    def _unpark(self, row: Waiting) -> None:
        """Hold `row` no longer; it may have been taken anew when its lease had passed, and is held for that then."""
        if self.parked.get(row.id) is row:
            del self.parked[row.id]

    async def _lose(self, outcomes: Sequence[Outcome]) -> None:
        """Look again at messages that somebody else has recorded, and leave rows to who has taken them since."""
        self._intake.put_back([outcome.item for outcome in outcomes if outcome.again is None])
        for outcome in outcomes:
            if (row := outcome.again) is not None:
                logger.warning(
                    "%s has lost its lease on %s, which is tried elsewhere",
                    self.handler.name,
                    row.message_id,
                    extra={"action": "handler.lease_lost", "handler": self.handler.name, "message_id": row.message_id},
                )
                self._unpark(row)
                await outcome.item.delivery.requeue()

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

    async def _commit(self, outcomes: Sequence[Outcome]) -> None:
        try:
            kept, after_commit = await self._tools.until_database_answers(
                self.handler.name, lambda: self._recorder.commit(outcomes)
            )
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
        for outcome in kept:
            self._settled(outcome.item)
        for outcome in outcomes:
            if outcome.envelope is not None:
                self._release(outcome.envelope.key)
        if any(outcome.again is not None for outcome in kept):
            self._tools.look_again()
        known = {id(outcome) for outcome in kept}
        await self._lose([outcome for outcome in outcomes if id(outcome) not in known])
        await failpoint("handler.after_ack")

    def _spoil(self, outcome: Outcome, error: Exception) -> None:
        """Turn an outcome that cannot be stored into one that can: without its events, then without its reply."""
        logger.error(
            "%s: the outcome of a message cannot be stored: %r",
            self.handler.name,
            error,
            extra={"action": "handler.spoilt", "handler": self.handler.name},
        )
        if outcome.dead is not None and not outcome.messages:
            raise error
        code = error.code if isinstance(error, CoordinatorError) else "failed"
        spoilt = self.answers.fail(outcome.item, outcome.envelope, code, repr(error), attempts=1)
        if outcome.dead is None:
            outcome.messages, outcome.reply, outcome.dead = spoilt.messages, spoilt.reply, spoilt.dead
            outcome.again = None
        else:
            outcome.messages, outcome.reply = [], None
