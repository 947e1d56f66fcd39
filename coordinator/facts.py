"""What must be known before a batch is decided on: its instances with their items, and who waits for its events."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection

from coordinator.instance import Instance
from coordinator.items import Items
from coordinator.sagas import CONSUMER, Sagas
from coordinator.store import Store
from coordinator.waiting import Correlation, Waiters, correlations
from events.codec import Readable
from events.derive import derive_id
from events.envelope import Envelope
from events.errors import RejectedError
from events.intake import Item
from events.message import Event


@dataclass(frozen=True, slots=True)
class Facts:
    """What a batch is decided on.

    Attributes:
        loaded: instances by id.
        standing: the instances and steps that wait for an event, by correlation.
        by_key: instances by saga and business key, for events that nobody waits for.
        taken: the keys of messages that were taken before.
    """

    loaded: Mapping[UUID, Instance]
    standing: Mapping[UUID, Sequence[tuple[UUID, str]]] = field(default_factory=dict)
    by_key: Mapping[tuple[str, str], UUID] = field(default_factory=dict)
    taken: Collection[UUID] = ()


NOTHING = Facts({})


def child_id(parent: UUID, step: str) -> UUID:
    """Return the id of the child saga that a step has."""
    return derive_id(parent, step, "child")


class Lookups:
    """Reads facts, with a statement for each kind that a batch needs.

    Args:
        sagas: the definitions.
        store, items, waiters: where they are.
    """

    def __init__(self, sagas: Sagas, store: Store, items: Items, waiters: Waiters) -> None:
        self._sagas = sagas
        self._store = store
        self._items = items
        self._waiters = waiters

    async def of_messages(self, connection: AsyncConnection, items: Iterable[Item], *, lock: bool) -> Facts:
        """Return what is to be known for messages; lock the instances or not."""
        envelopes = [item.part.envelope for item in items if isinstance(item.part, Readable)]
        named, once, found = self._spoken_of(envelopes)
        standing = await self._waiters.standing(connection, found) if found else {}
        unmet = [(each.saga, each.key) for each in found if each.key is not None and each.id not in standing]
        by_key = await self._waiters.named(connection, unmet) if unmet else {}
        taken = await self._waiters.known(connection, once, CONSUMER) if once else set()
        ids = {saga_id for saga_id, _ in named} | set(by_key.values())
        ids |= {saga_id for each in standing.values() for saga_id, _ in each}
        loaded = await self.of(connection, ids, named, lock=lock)
        return Facts(loaded, standing, by_key, taken)

    async def of(
        self,
        connection: AsyncConnection,
        ids: Collection[UUID],
        named: Iterable[tuple[UUID, str]] = (),
        *,
        lock: bool = True,
    ) -> dict[UUID, Instance]:
        """Return instances with the items of theirs that are `named`, and those that come next."""
        loaded = await self._store.load(connection, list(ids), lock=lock) if ids else {}
        return await self.with_items(connection, loaded, named)

    async def with_items(
        self,
        connection: AsyncConnection,
        loaded: Mapping[UUID, Instance],
        named: Iterable[tuple[UUID, str]] = (),
        *,
        due: datetime | None = None,
    ) -> dict[UUID, Instance]:
        """Return loaded instances with items: those `named`, those that come next, and those that are `due`."""
        known = self._sagas.by_version
        definitions = {
            saga_id: known[at.saga, at.version] for saga_id, at in loaded.items() if (at.saga, at.version) in known
        }
        return await self._items.load(connection, loaded, definitions, named, due=due)

    def _spoken_of(self, envelopes: Iterable[Envelope]) -> tuple[set[tuple[UUID, str]], list[UUID], list[Correlation]]:
        """Return the instances and steps, the messages that are taken once only, and what events are found by."""
        named: set[tuple[UUID, str]] = set()
        once: list[UUID] = []
        found: list[Correlation] = []
        for envelope in envelopes:
            link = envelope.saga
            if self._sagas.is_for_child(envelope):
                once.append(envelope.key)
                if link is not None:
                    named.add((child_id(link.saga_id, link.step), ""))
                    once += [link.undoes] if link.undoes is not None else []
            elif link is not None:
                named.add((link.saga_id, link.step))
            elif envelope.type in self._sagas.awaited:
                once.append(envelope.key)
                found += self._correlations(envelope)
        return named, once, found

    def _correlations(self, envelope: Envelope) -> list[Correlation]:
        try:
            event = self._sagas.registry.read(envelope)
            return correlations(self._sagas.awaited[envelope.type], event) if isinstance(event, Event) else []
        except (RejectedError, ValueError):
            return []  # whoever takes it says what is wrong with it
