"""Dead letters: replayed, edited, discarded, and deleted when nobody needs them any more.

A replay puts the letter's message where messages wait to be tried again, for the one handler that failed, under the
same event id. Letters of one saga are replayed in their order: each waits until those before it are handled.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from events.bulk import Lookup
from events.bus import Address, Exchange
from events.clock import Clock
from events.codec import Limits, Readable
from events.database import transaction
from events.dead_letters import BUS, CONFLICT, COORDINATOR, DEAD
from events.envelope import Direction, Envelope
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
from handlers.retries import Retries, Waiting
from handlers.tables import inbox, retry

_PAGE = 100  # letters with their bodies
_GONE_ON = "its saga was told that it failed and has gone on; what it would do now was, or will be, undone"
_TAKEN = "another message with its id was handled; publish it under an id of its own"
_UNKNOWN_WAY = "it is not known where it was sent to"
_WAITS = "its message waits to be tried already"
_HANDLED = "its message was handled after it had died"
_NOT_RUNNING = (
    "no process runs its handler {}: start one, or name the application that has it (--app); if nobody has it any more,"
    " discard the letter"
)
_REMOVED = "the application has no handler {}: name the one that has it, or discard the letter"
_SETTLED = "it is {0.status}, by {0.settled_by}; only what is dead can be {1}"
_waiting = Lookup(retry, "message_key", "consumer", key="message_key")
_handled = Lookup(inbox, "message_key", "consumer", "handled_at", key="message_key")
_stored = Lookup(retry, "id", key="id")


@dataclass(frozen=True, slots=True)
class Planned:
    """What a replay does with a letter.

    Attributes:
        letter: the letter.
        refused: why it is not replayed, if it is not.
        after: the seconds after which it is due.
        behind: the older letter of its saga behind which it waits.
        held_by: an older letter of its saga that cannot be replayed: this one waits until that is discarded.
        envelope: its message.
    """

    letter: Letter
    refused: str | None = None
    after: float = 0.0
    behind: UUID | None = None
    held_by: UUID | None = None
    envelope: Envelope | None = None


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
        known, newest = await self._known(), await self._newest(query)
        number, last = 0, UUID(int=0)
        missing = set(query.ids or ())
        while last < newest:
            async with self._reader.connect() as connection:
                where = _page_of(query, last, newest)
                statement = dead_letter.select().where(where).order_by(dead_letter.c.id).limit(_PAGE)
                letters = [Letter.of(row) for row in (await connection.execute(statement)).mappings()]
                page = await self._plan(connection, letters, known, number, rate)
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
        known, newest = await self._known(), await self._newest(query)
        number, last = 0, UUID(int=0)
        missing = set(query.ids or ())
        while last < newest:
            async with transaction(self._engine) as connection:
                letters = await letter_changes.lock(connection, _page_of(query, last, newest), _PAGE)
                page = await self._plan(connection, letters, known, number, rate)
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

    async def _known(self) -> frozenset[str]:
        """Return the names of those who can take letters."""
        if self._consumers is not None:
            return frozenset(self._consumers)
        return await self._operations.known(self._retries.clock.now()) | {BUS, COORDINATOR}

    async def _newest(self, query: Query) -> UUID:
        """Return the last letter that there is now: those that die from now on are not meant."""
        statement = select(dead_letter.c.id).where(query.condition()).order_by(dead_letter.c.id.desc()).limit(1)
        async with self._reader.connect() as connection:
            return (await connection.execute(statement)).scalar() or UUID(int=0)

    async def _settled(self, ids: Iterable[UUID]) -> AsyncIterator[Planned]:
        """Say of letters that were asked for by id, and are not dead, that somebody else was quicker."""
        for letter in [await self.get(each) for each in sorted(ids)]:
            yield Planned(letter, _SETTLED.format(letter, "replayed"))

    async def _plan(
        self,
        connection: AsyncConnection,
        letters: Sequence[Letter],
        known: frozenset[str],
        number: int,
        rate: float | None,
    ) -> list[Planned]:
        judged = [self._judge(letter, known) for letter in letters]
        sagas = {each.letter.saga_id for each in judged if each.refused is None and each.letter.saga_id}
        older = await self._unhandled_of_sagas(connection, sagas, letters[-1].id, known) if sagas else {}
        page = []
        for each in await self._without_known(connection, judged):
            planned = self._in_order(each, older)
            if planned.refused is None:
                planned = replace(planned, after=number / rate if rate else 0.0)
                number += 1
            page.append(planned)
        return page

    def _in_order(self, planned: Planned, older: dict[UUID, dict[UUID, bool]]) -> Planned:
        letter = planned.letter
        if planned.refused is not None or letter.saga_id is None:
            return planned
        before = {each: stays for each, stays in older.get(letter.saga_id, {}).items() if each < letter.id}
        behind = max(before, default=None)
        if letter.consumer == BUS and behind is not None:  # once sent it would wait for nobody
            return replace(planned, refused=f"letter {behind} of its saga is to be handled, or discarded, before it")
        return replace(
            planned, behind=behind, held_by=max((each for each, stays in before.items() if stays), default=None)
        )

    async def _without_known(self, connection: AsyncConnection, judged: Sequence[Planned]) -> list[Planned]:
        """Refuse those whose message waits already, or was handled since."""
        keys = [each.envelope.key for each in judged if each.envelope is not None]
        waiting = {tuple(row) for row in await _waiting.find(connection, keys)} if keys else set()
        handled: dict[tuple[UUID, str], datetime] = {}
        for key, consumer, at in await _handled.find(connection, keys) if keys else ():
            handled[key, consumer] = at
        page = []
        for each in judged:
            letter, envelope = each.letter, each.envelope
            if each.refused is None and envelope is not None and letter.consumer != BUS:
                names = [(envelope.key, name) for name in (letter.consumer, OF_SAGAS)]
                since = any(name in handled and handled[name] > letter.dead_at for name in names)
                if names[0] in waiting:
                    page.append(replace(each, refused=_WAITS))
                    continue
                if since and letter.consumer != COORDINATOR and not letter.was_given_up_by_broker:
                    page.append(replace(each, refused=_HANDLED))
                    continue
                waiting.add(names[0])
            page.append(each)
        return page

    async def _unhandled_of_sagas(
        self, connection: AsyncConnection, sagas: set[UUID], last: UUID, known: frozenset[str]
    ) -> dict[UUID, dict[UUID, bool]]:
        """Return the letters of `sagas` that are dead or being replayed, and whether each cannot be replayed."""
        found: dict[UUID, dict[UUID, bool]] = {saga: {} for saga in sagas}
        columns = dead_letter.c
        first = UUID(int=0)
        while True:
            where = columns.saga_id.in_(sagas), columns.status == DEAD, columns.id > first, columns.id < last
            statement = dead_letter.select().where(*where).order_by(columns.id).limit(_PAGE)
            letters = [Letter.of(row) for row in (await connection.execute(statement)).mappings()]
            for letter in letters:
                if letter.saga_id is not None:
                    found[letter.saga_id][letter.id] = self._judge(letter, known).refused is not None
            if len(letters) < _PAGE:
                break
            first = letters[-1].id
        waits = retry.c.saga_id.in_(sagas), retry.c.dead_letter_id.is_not(None)
        for saga_id, replayed in await connection.execute(
            select(retry.c.saga_id, retry.c.dead_letter_id).where(*waits)
        ):
            found[saga_id].setdefault(replayed, False)
        return found

    def _judge(self, letter: Letter, known: frozenset[str]) -> Planned:
        if letter.consumer == BUS and _address(letter) is None:
            return Planned(letter, _UNKNOWN_WAY)
        if letter.reason == CONFLICT:
            return Planned(letter, _TAKEN)
        if letter.consumer not in known:
            return Planned(letter, (_NOT_RUNNING if self._consumers is None else _REMOVED).format(letter.consumer))
        parts = letter.read(self._limits)
        part = parts[0]
        if len(parts) > 1 or not isinstance(part, Readable):
            why = "it holds several messages" if isinstance(part, Readable) else str(part.error)
            return Planned(letter, f"it cannot be read: {why}; edit it first")
        saga = part.envelope.saga
        if letter.consumer != BUS and saga is not None and saga.result is None and saga.direction is Direction.DO:
            return Planned(letter, _GONE_ON)
        return Planned(letter, envelope=part.envelope)

    async def _send_back(self, connection: AsyncConnection, page: Sequence[Planned], begun: datetime) -> list[Planned]:
        """Let letters be tried again, or be sent again; return the page without those that somebody else tries."""
        rows: dict[UUID, Waiting] = {}
        entries: dict[datetime, list[Entry]] = {}
        for planned in page:
            letter, envelope = planned.letter, planned.envelope
            if planned.refused is not None or envelope is None:
                continue
            due_at = begun + timedelta(seconds=planned.after)
            if (address := _address(letter)) is not None:
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
        page = [replace(each, refused=_WAITS) if each.letter.id in passed else each for each in page]
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


def _address(letter: Letter) -> Address | None:
    """Return where a message was sent that reached no queue."""
    exchange, key = letter.headers.get("exchange"), letter.headers.get("routing_key")
    if letter.consumer != BUS or exchange not in {each.value for each in Exchange} or not isinstance(key, str):
        return None
    return Address(Exchange(exchange), key)
