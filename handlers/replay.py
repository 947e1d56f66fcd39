"""Dead letters: replayed, edited, discarded, and deleted when nobody needs them any more.

A replay puts the letter's message where messages wait to be tried again, for the one handler that failed, under the
same event id. Letters of one saga are replayed in their order: each waits until those before it are handled.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from events.bulk import Lookup
from events.clock import Clock
from events.codec import Limits, Readable
from events.database import transaction
from events.dead_letters import BUS, COORDINATOR, DEAD
from events.envelope import Envelope
from events.errors import ConfigurationError
from events.ids import Ids
from events.message import DEFAULT_BUNDLE
from events.relay import Entry, insert_entries
from events.tables import dead_letter
from handlers import letter_changes
from handlers.inbox import OF_SAGAS
from handlers.letter_changes import Act, refuse_silence
from handlers.letter_edits import Consumers, check, whole_event, with_data
from handlers.letters import DISCARDED, EDITED, REPLAYED, Letter, Letters, Query
from handlers.operations import Operations
from handlers.replay_plan import WAITS, Planned, Planner, address_of
from handlers.retries import Retries, Waiting
from handlers.tables import inbox, retry

_PAGE = 100  # letters with their bodies
_SETTLED = "it is {0.status}, by {0.settled_by}; only what is dead can be {1}"
_stored = Lookup(retry, "id", key="id")


class DeadLetters(Letters):
    """The dead letters of a database, to be settled.

    Args:
        engine: the database.
        clock: paces how often the database's clock is asked.
        ids: names rows.
        limits: the largest message that is replayed.
        consumers: who takes the letters of an application, by name, and what each can read. Without it those are known
            that a process runs now, and nothing can be edited.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        clock: Clock,
        ids: Ids,
        limits: Limits | None = None,
        consumers: Consumers | None = None,
    ) -> None:
        super().__init__(engine)
        self._ids = ids
        self._limits = limits or Limits()
        self._consumers = consumers
        self._retries = Retries(engine, clock=clock, ids=ids)
        self._operations = Operations(engine, ids=ids)

    # Replaying

    async def plan(self, query: Query, *, rate: float | None = None) -> AsyncGenerator[Planned, None]:
        """Say what `replay` would do, letter by letter, oldest first. Nothing is changed.

        Raises:
            ConfigurationError: the rate is none.
        """
        _check(rate)
        await self._retries.clock.calibrate()
        planner, newest = await self._planner(), await self._newest(query)
        number, last = 0, UUID(int=0)
        missing = set(query.ids or ())
        while last < newest:
            async with self._reader.connect() as connection:
                where = _page_of(query, last, newest)
                statement = dead_letter.select().where(where).order_by(dead_letter.c.id).limit(_PAGE)
                letters = [Letter.of(row) for row in (await connection.execute(statement)).mappings()]
                page = await planner.plan(connection, letters, number, rate)
            for planned in page:
                yield planned
            number += sum(planned.refused is None for planned in page)
            missing.difference_update(letter.id for letter in letters)
            last = letters[-1].id if letters else newest
        async for planned in self._settled(missing):
            yield planned

    async def replay(
        self, query: Query, *, rate: float | None = None, by: str, why: str
    ) -> AsyncGenerator[Planned, None]:
        """Replay letters that are dead now, `rate` a second at most; return what was done, oldest first.

        Each page of letters is one transaction: what was returned is done.

        Raises:
            ConfigurationError: the rate is none, or it is not said who does this, or why.
        """
        _check(rate)
        await self._retries.clock.calibrate()
        begun = self._retries.clock.now()
        act = self._act(REPLAYED, by, why)
        planner, newest = await self._planner(), await self._newest(query)
        number, last = 0, UUID(int=0)
        missing = set(query.ids or ())
        while last < newest:
            async with transaction(self._engine) as connection:
                letters = await letter_changes.lock(connection, _page_of(query, last, newest), _PAGE)
                page = await planner.plan(connection, letters, number, rate)
                page = await self._send_back(connection, page, begun)
                replayed = [planned.letter.id for planned in page if planned.refused is None]
                await act.record(connection, replayed, status=REPLAYED)
            for planned in page:
                yield planned
            number += len(replayed)
            missing.difference_update(letter.id for letter in letters)
            last = letters[-1].id if letters else newest
        async for planned in self._settled(missing):
            yield planned

    async def _planner(self) -> Planner:
        if self._consumers is not None:
            return Planner(frozenset(self._consumers), running=False, limits=self._limits)
        running = await self._operations.known(self._retries.clock.now())
        return Planner(running | {BUS, COORDINATOR}, running=True, limits=self._limits)

    async def _newest(self, query: Query) -> UUID:
        """Return the last letter that there is now: those that die from now on are not meant."""
        statement = select(dead_letter.c.id).where(query.condition()).order_by(dead_letter.c.id.desc()).limit(1)
        async with self._reader.connect() as connection:
            return (await connection.execute(statement)).scalar() or UUID(int=0)

    async def _settled(self, ids: Iterable[UUID]) -> AsyncIterator[Planned]:
        """Say of letters that were asked for by id, and are not dead, that somebody else was quicker."""
        for letter in [await self.get(each) for each in sorted(ids)]:
            yield Planned(letter, _SETTLED.format(letter, "replayed"))

    async def _send_back(self, connection: AsyncConnection, page: Sequence[Planned], begun: datetime) -> list[Planned]:
        """Let letters be tried again, or be sent again; return the page without those that somebody else tries."""
        rows: dict[UUID, Waiting] = {}
        entries: dict[datetime, list[Entry]] = {}
        for planned in page:
            letter, envelope = planned.letter, planned.envelope
            if planned.refused is not None or envelope is None:
                continue
            due_at = begun + timedelta(seconds=planned.after)
            if (address := address_of(letter)) is not None:
                trace = envelope.traceparent, envelope.tracestate
                entry = Entry(self._ids.new(), address, DEFAULT_BUNDLE, letter.to_send, *trace)
                entries.setdefault(due_at, []).append(entry)
            else:
                rows[letter.id] = self._waiting_row(letter, envelope, due_at)
        await self._retries.add(connection, list(rows.values()))
        stored = (
            {row[0] for row in await _stored.find(connection, [row.id for row in rows.values()])} if rows else set()
        )
        # Its message may have come again meanwhile, and waits for itself.
        passed = {letter_id for letter_id, row in rows.items() if row.id not in stored}
        added = rows.keys() - passed
        page = [replace(each, refused=WAITS) if each.letter.id in passed else each for each in page]
        await self._forget_failures(connection, [each for each in page if each.letter.id in added])
        for due_at, due in entries.items():
            await insert_entries(connection, due, due_at=due_at)
        return page

    async def _forget_failures(self, connection: AsyncConnection, replayed: Sequence[Planned]) -> None:
        """Let messages be tried that are recorded as handled, since they were given up on."""
        keys: dict[str, list[UUID]] = {}
        for planned in replayed:
            letter = planned.letter
            if planned.envelope is not None and letter.consumer != COORDINATOR and not letter.was_given_up_by_broker:
                keys.setdefault(planned.letter.consumer, []).append(planned.envelope.key)
        for consumer, failed in keys.items():
            own = inbox.c.consumer.in_((consumer, OF_SAGAS))
            await connection.execute(inbox.delete().where(inbox.c.message_key.in_(failed), own))

    def _waiting_row(self, letter: Letter, envelope: Envelope, due_at: datetime) -> Waiting:
        return Waiting(
            id=self._ids.new(),
            consumer=letter.consumer,
            key=envelope.key,
            body=letter.to_send,
            content=None,  # it may have been edited
            content_type=letter.type_to_send,
            headers=letter.headers,
            message_id=envelope.id,
            message_type=envelope.type,
            saga_id=envelope.saga.saga_id if envelope.saga else None,
            traceparent=envelope.traceparent,
            first_at=due_at,
            due_at=due_at,
            dead_letter_id=letter.id,
        )

    # Editing, discarding, deleting

    async def edit(
        self, reference: UUID | str, *, by: str, why: str, data: bytes | None = None, event: bytes | None = None
    ) -> Letter:
        """Give a dead letter other data, or a whole event in its place; a replay takes that, and the original is kept.

        Raises:
            ConfigurationError: there is no such dead letter, this would be another message, its handler could not take
                it, or nobody knows what that can take.
        """
        refuse_silence(by, why)
        if self._consumers is None:
            raise ConfigurationError("name the application (--app) whose handler is to take what is edited")
        found = await self.get(reference)
        await self._retries.clock.calibrate()
        act = self._act(EDITED, by, why)
        async with transaction(self._engine) as connection:
            is_dead = (dead_letter.c.id == found.id) & (dead_letter.c.status == DEAD)
            locked = await letter_changes.lock(connection, is_dead, 1)
            for letter in locked:
                edited = whole_event(event, self._limits) if event else with_data(letter, data or b"", self._limits)
                check(letter, edited, self._consumers)
                await act.record(
                    connection, [letter.id], edited.raw, edited_body=edited.raw, **_known_now(letter, edited)
                )
        found = await self.get(found.id)
        if not locked:
            raise ConfigurationError(f"dead letter {found.id}: {_SETTLED.format(found, 'edited')}")
        return found

    async def discard(self, query: Query, *, by: str, why: str) -> int:
        """Settle letters without a replay; they stay in the table. Return how many there were.

        A letter that was replayed and is named by its id is called back, unless it is being tried or was handled.

        Raises:
            ConfigurationError: it is not said who does this, or why.
        """
        await self._retries.clock.calibrate()
        act = self._act(DISCARDED, by, why)
        count, last, newest = 0, UUID(int=0), await self._newest(query)
        named = [await self.get(each) for each in query.ids or ()]
        if replayed := [(letter, self._envelope_of(letter)) for letter in named if letter.status == REPLAYED]:
            async with transaction(self._engine) as connection:
                back = await letter_changes.call_back(connection, replayed, self._retries.clock.now())
                is_back = dead_letter.c.id.in_(back) & (dead_letter.c.status == REPLAYED)
                letters = await letter_changes.lock(connection, is_back, len(back))
                await act.record(connection, [letter.id for letter in letters], status=DISCARDED)
            count += len(letters)
        while last < newest:
            async with transaction(self._engine) as connection:
                letters = await letter_changes.lock(connection, _page_of(query, last, newest), _PAGE)
                await act.record(connection, [letter.id for letter in letters], status=DISCARDED)
            count += len(letters)
            last = letters[-1].id if letters else newest
        return count

    def _envelope_of(self, letter: Letter) -> Envelope | None:
        part = letter.read(self._limits)[0]
        return part.envelope if isinstance(part, Readable) else None

    async def purge(self, older_than: timedelta, *, dry_run: bool = False) -> int:
        """Delete letters that were replayed or discarded so long ago; return how many. What is dead is kept.

        Args:
            older_than: the age.
            dry_run: only count them.
        """
        await self._retries.clock.calibrate()
        before = self._retries.clock.now() - older_than
        if dry_run:
            async with self._reader.connect() as connection:
                return await letter_changes.count_old(connection, before)
        count = 0
        while True:
            async with transaction(self._engine) as connection:
                gone = await letter_changes.purge(connection, before, _PAGE)
            count += gone
            if gone < _PAGE:
                return count

    def _act(self, what: str, by: str, why: str) -> Act:
        return Act(what, by=by, why=why, now=self._retries.clock.now(), ids=self._ids)


def _page_of(query: Query, last: UUID, newest: UUID) -> ColumnElement[bool]:
    columns = dead_letter.c
    return query.condition() & (columns.status == DEAD) & (columns.id > last) & (columns.id <= newest)


def _known_now(letter: Letter, edited: Readable) -> dict[str, object]:
    """Return what is known of a letter that nobody could read before."""
    if letter.message_id is not None:
        return {}
    envelope = edited.envelope
    return {
        "message_id": envelope.id,
        "message_type": envelope.type,
        "saga_id": envelope.saga.saga_id if envelope.saga else None,
        "traceparent": envelope.traceparent,
    }


def _check(rate: float | None) -> None:
    if rate is not None and not rate > 0:
        raise ConfigurationError(f"a rate is more than 0 letters a second, not {rate:g}")
