"""Which instances wait for which events, and events that are early: kept until an instance waits for them.

Two transactions may miss each other: one that parks an event since nobody waits for it, and one that begins to wait
since no event was there. Both look for such a pair again after their commit, so that the later one finds it; after a
crash a sweep does.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import delete, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.definition import SagaDefinition
from coordinator.tables import parked_event, saga_instance, saga_wait
from coordinator.waits import Wait
from events.bulk import Bulk, Lookup, delete_by_id
from events.codec import STRUCTURED_TYPE
from events.derive import derive_id
from events.message import Event
from handlers.tables import inbox

_ROOT = UUID("5a6ac00d-0000-8000-8000-000000000001")
_waits = Bulk(saga_wait, "id", "correlation", "saga_id", "step", "event", "since")
_standing = Lookup(saga_wait, "correlation", "saga_id", "step", key="correlation")
_park = Bulk(parked_event, "id", "correlation", "saga", "event", "body", "parked_at", "expires_at")
_taken = Bulk(inbox, "message_key", "consumer", "handled_at")
_known = Lookup(inbox, "message_key", "consumer", key="message_key")


@dataclass(frozen=True, slots=True)
class Correlation:
    """What an event is found by among the instances of one saga.

    Attributes:
        id: stands for saga, event type and values.
        saga: the name of the saga.
        key: the business key, where the event names just that.
        wait: the part of the newest version that waits for it.
    """

    id: UUID
    saga: str
    key: str | None
    wait: Wait


def correlation_id(saga: str, event_type: str, values: str) -> UUID:
    """Return what stands for these values of an event, for one saga."""
    return derive_id(_ROOT, saga, event_type, values)


def correlations(definitions: Iterable[SagaDefinition], event: Event) -> list[Correlation]:
    """Return what `event` is found by, once for each saga and set of fields.

    Raises:
        ValueError: it leaves a field empty by which it is found.
    """
    found: dict[UUID, Correlation] = {}
    for definition in definitions:
        for wait in definition.waits:
            if isinstance(event, wait.events):
                identity = correlation_id(definition.name, event.message_type, wait.values_of(event, of_event=True))
                names_key = list(wait.by.values()) == [definition.key_field]
                key = str(getattr(event, next(iter(wait.by)))) if names_key else None
                found[identity] = Correlation(identity, definition.name, key, wait)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Begun:
    """A part of a flow that begins to wait: the instance, its saga, the step, the events, and their values."""

    saga_id: UUID
    saga: str
    step: str
    events: tuple[str, ...]
    values: str


@dataclass(frozen=True, slots=True)
class ParkedEvent:
    """An event to be kept: for which correlation, for how long, and as which bytes."""

    id: UUID
    correlation: Correlation
    event: str
    body: bytes

    @property
    def keep(self) -> float:
        """Seconds that it is kept for."""
        return self.correlation.wait.keep


@dataclass(slots=True)
class EarlyDelivery:
    """A parked event, as a delivery: it was acknowledged when it was parked."""

    body: bytes
    content_type: str | None = STRUCTURED_TYPE
    content_encoding: str | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)
    redelivered: bool = False

    async def ack(self) -> None:
        """It was."""

    async def requeue(self) -> None:
        """It is in its table until the commit of what follows."""


class Waiters:
    """Who waits, and what is early, in one database."""

    async def standing(
        self, connection: AsyncConnection, found: Iterable[Correlation]
    ) -> dict[UUID, list[tuple[UUID, str]]]:
        """Return the instances and steps that wait, by correlation."""
        keys = [each.id for each in found]
        standing: dict[UUID, list[tuple[UUID, str]]] = {}
        for correlation, saga_id, step in await _standing.find(connection, keys) if keys else ():
            standing.setdefault(correlation, []).append((saga_id, step))
        return standing

    async def named(self, connection: AsyncConnection, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], UUID]:
        """Return the instances that have these names of a saga and business keys."""
        named: dict[tuple[str, str], UUID] = {}
        for saga in {saga for saga, _ in keys}:
            of_saga = [key for name, key in keys if name == saga]
            columns = (saga_instance.c.key, saga_instance.c.id)
            query = select(*columns).where(saga_instance.c.saga == saga, saga_instance.c.key.in_(of_saga))
            named |= {(saga, row.key): row.id for row in await connection.execute(query)}
        return named

    async def known(self, connection: AsyncConnection, keys: Sequence[UUID], consumer: str) -> set[UUID]:
        """Return which of these messages were taken before."""
        return {key for key, by in await _known.find(connection, keys) if by == consumer} if keys else set()

    async def write(
        self,
        connection: AsyncConnection,
        *,
        begun: Sequence[Begun],
        over: Iterable[tuple[UUID, str, tuple[str, ...]]],
        parked: Sequence[ParkedEvent],
        taken: Iterable[UUID],
        consumer: str,
        now: datetime,
    ) -> None:
        """Write who waits and who waits no more, what is early, and which events were taken.

        May stand in a block of `together`. An event that another process has taken meanwhile is an `IntegrityError`.
        """
        await _waits.insert(
            connection,
            [
                (_id(b.saga_id, b.step, event), correlation_id(b.saga, event, b.values), b.saga_id, b.step, event, now)
                for b in begun
                for event in b.events
            ],
        )
        gone = [_id(saga_id, step, event) for saga_id, step, events in over for event in events]
        await delete_by_id(connection, saga_wait, gone)
        await _park.insert(
            connection,
            [
                (
                    p.id,
                    p.correlation.id,
                    p.correlation.saga,
                    p.event,
                    p.body,
                    now,
                    now + timedelta(seconds=p.keep),
                )
                for p in parked
            ],
        )
        await _taken.insert(connection, [(key, consumer, now) for key in sorted(set(taken))])

    async def claim(
        self,
        connection: AsyncConnection,
        known: Iterable[tuple[str, int]],
        most: int,
        among: Collection[UUID] | None = None,
    ) -> list[Any]:
        """Return parked events that an instance of a `known` saga and version waits for by now, locked.

        `among` are the correlations that are looked at; all of them takes a second where there are 100,000 events and
        as many instances that wait for others.
        """
        is_known = tuple_(saga_instance.c.saga, saga_instance.c.version).in_(list(known))
        waited_for = select(saga_wait.c.correlation).join(saga_instance, saga_instance.c.id == saga_wait.c.saga_id)
        narrowed = [] if among is None else [parked_event.c.correlation.in_(among)]
        query = (
            select(parked_event.c.id, parked_event.c.saga, parked_event.c.body)
            .where(parked_event.c.correlation.in_(waited_for.where(is_known)), *narrowed)
            .order_by(parked_event.c.id)
            .limit(most)
            .with_for_update(skip_locked=True)
        )
        return list((await connection.execute(query)).all())

    async def remove(self, connection: AsyncConnection, ids: Sequence[UUID]) -> None:
        """Delete parked events that were handed over. May stand in a block of `together`."""
        await delete_by_id(connection, parked_event, ids)

    async def expire(self, connection: AsyncConnection, now: datetime, most: int) -> list[Any]:
        """Delete parked events that nobody has waited for in time; return them."""
        old = select(parked_event.c.id).where(parked_event.c.expires_at <= now).limit(most)
        is_old = parked_event.c.id.in_(old.with_for_update(skip_locked=True))
        columns = (parked_event.c.id, parked_event.c.saga, parked_event.c.event)
        found = await connection.execute(delete(parked_event).where(is_old).returning(*columns))
        return list(found.all())


def _id(saga_id: UUID, step: str, event: str) -> UUID:
    return derive_id(saga_id, "wait", step, event)
