"""What a replay does with each letter: it is tried again, waits behind an older one of its saga, or is refused."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from events.bulk import Lookup
from events.bus import Address, Exchange
from events.codec import Limits, Readable
from events.dead_letters import BUS, CONFLICT, COORDINATOR, DEAD
from events.envelope import Direction, Envelope
from events.tables import dead_letter
from handlers.inbox import OF_SAGAS
from handlers.letters import Letter
from handlers.tables import inbox, retry

_PAGE = 100  # letters with their bodies
_GONE_ON = "its saga was told that it failed and has gone on; what it would do now was, or will be, undone"
_TAKEN = "another message with its id was handled; publish it under an id of its own"
_UNKNOWN_WAY = "it is not known where it was sent to"
_HANDLED = "its message was handled after it had died"
_NOT_RUNNING = (
    "no process runs its handler {}: start one, or name the application that has it (--app); if nobody has it any more,"
    " discard the letter"
)
_REMOVED = "the application has no handler {}: name the one that has it, or discard the letter"
WAITS = "its message waits to be tried already"
_waiting = Lookup(retry, "message_key", "consumer", key="message_key")
_handled = Lookup(inbox, "message_key", "consumer", "handled_at", key="message_key")


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


class Planner:
    """Says what becomes of letters that are replayed.

    Args:
        known: who can take letters.
        running: whether these are those that a process runs, not those of an application.
        limits: the largest message that is replayed.
    """

    def __init__(self, known: frozenset[str], *, running: bool, limits: Limits) -> None:
        self._known = known
        self._running = running
        self._limits = limits

    async def plan(
        self,
        connection: AsyncConnection,
        letters: Sequence[Letter],
        number: int,
        rate: float | None,
    ) -> list[Planned]:
        """Return what becomes of a page of letters, oldest first, of which `number` others are replayed before."""
        judged = [self._judge(letter) for letter in letters]
        sagas = {each.letter.saga_id for each in judged if each.refused is None and each.letter.saga_id}
        older = await self._unhandled_of_sagas(connection, sagas, letters[-1].id) if sagas else {}
        judged = await self._without_known(connection, judged)
        for each in judged:
            if each.refused is not None and each.letter.saga_id in older:
                older[each.letter.saga_id][each.letter.id] = True
        page = []
        for each in judged:
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
                    page.append(replace(each, refused=WAITS))
                    continue
                if since and letter.consumer != COORDINATOR and not letter.was_given_up_by_broker:
                    page.append(replace(each, refused=_HANDLED))
                    continue
                waiting.add(names[0])
            page.append(each)
        return page

    async def _unhandled_of_sagas(
        self, connection: AsyncConnection, sagas: set[UUID], last: UUID
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
                    found[letter.saga_id][letter.id] = self._judge(letter).refused is not None
            if len(letters) < _PAGE:
                break
            first = letters[-1].id
        waits = retry.c.saga_id.in_(sagas), retry.c.dead_letter_id.is_not(None)
        for saga_id, replayed in await connection.execute(
            select(retry.c.saga_id, retry.c.dead_letter_id).where(*waits)
        ):
            found[saga_id].setdefault(replayed, False)
        return found

    def _judge(self, letter: Letter) -> Planned:
        if letter.consumer == BUS and address_of(letter) is None:
            return Planned(letter, _UNKNOWN_WAY)
        if letter.reason == CONFLICT:
            return Planned(letter, _TAKEN)
        if letter.consumer not in self._known:
            return Planned(letter, (_NOT_RUNNING if self._running else _REMOVED).format(letter.consumer))
        parts = letter.read(self._limits)
        part = parts[0]
        if len(parts) > 1 or not isinstance(part, Readable):
            why = "it holds several messages" if isinstance(part, Readable) else str(part.error)
            return Planned(letter, f"it cannot be read: {why}; edit it first")
        saga = part.envelope.saga
        if letter.consumer != BUS and saga is not None and saga.result is None and saga.direction is Direction.DO:
            return Planned(letter, _GONE_ON)
        return Planned(letter, envelope=part.envelope)


def address_of(letter: Letter) -> Address | None:
    """Return where a message was sent that reached no queue."""
    exchange, key = letter.headers.get("exchange"), letter.headers.get("routing_key")
    if letter.consumer != BUS or exchange not in {each.value for each in Exchange} or not isinstance(key, str):
        return None
    return Address(Exchange(exchange), key)
