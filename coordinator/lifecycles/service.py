"""The imperative shell of life cycles: load, decide, and commit the entity, its audit entry and its event together."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from coordinator.lifecycles.definition import Lifecycle, LifecycleDefinition
from coordinator.lifecycles.entity import (
    Act,
    Actor,
    Delegation,
    Entity,
    Moved,
    NotAllowedError,
)
from coordinator.lifecycles.moves import create, move
from coordinator.lifecycles.store import LifecycleStore
from events import tracing
from events.bulk import together
from events.clock import Clock
from events.codec import Limits
from events.database import transaction
from events.derive import derive_id
from events.envelope import wrap
from events.errors import ConfigurationError, CoordinatorError
from events.ids import Ids
from events.outbox import AfterCommit, Outbound, Outbox, route

ADMINISTRATOR = "administrator"  # who has this role may delegate, and take back, for others


class NoSuchEntityError(CoordinatorError):
    """There is no entity with this business key."""

    code = "no_such_entity"


class AlreadyThereError(CoordinatorError):
    """There is an entity with this business key already."""

    code = "already_there"


class Definitions:
    """The life cycles of an application, as they are looked up."""

    def __init__(self, lifecycles: Iterable[type[Lifecycle]]) -> None:
        self.by_version = {(each.definition.name, each.definition.version): each.definition for each in lifecycles}

    def of(self, entity: Entity) -> LifecycleDefinition:
        """Return the definition that `entity` was created with.

        Raises:
            ConfigurationError: it is not part of this application.
        """
        definition = self.by_version.get((entity.lifecycle, entity.version))
        if definition is None:
            raise ConfigurationError(
                f"the life cycle {entity.lifecycle} version {entity.version} is not part of this application"
            )
        return definition

    def newest(self, name: str) -> LifecycleDefinition:
        """Return the newest version of a life cycle.

        Raises:
            ConfigurationError: there is none of this name.
        """
        versions = [each for each in self.by_version.values() if each.name == name]
        if not versions:
            names = ", ".join(sorted({each.name for each in self.by_version.values()})) or "none"
            raise ConfigurationError(f"this application has no life cycle called {name}; it has: {names}")
        return max(versions, key=lambda each: each.version)

    def waiting_for(self, roles: Iterable[str]) -> list[tuple[str, int, str]]:
        """Return name, version and state where one of `roles` allows something."""
        wanted = frozenset(roles)
        return [
            (definition.name, definition.version, state)
            for definition in self.by_version.values()
            for state in definition.states
            if any(wanted & each.roles for each in definition.out_of(state))
        ]


class Lifecycles:
    """The entities of an application: created, moved by people, and looked at.

    Args:
        lifecycles: the life cycle classes.
        source: the CloudEvents source of the events that are published.
        store: where the entities are.
        outbox: where the events go.
        clock, ids: the ports for time and names.
        limits: the largest event.
    """

    def __init__(
        self,
        lifecycles: Iterable[type[Lifecycle]],
        *,
        source: str,
        store: LifecycleStore,
        outbox: Outbox,
        clock: Clock,
        ids: Ids,
        limits: Limits,
    ) -> None:
        self.definitions = Definitions(lifecycles)
        self.store = store
        self._source = source
        self._outbox = outbox
        self._clock = clock
        self._ids = ids
        self._limits = limits

    @property
    def engine(self) -> AsyncEngine:
        """The database."""
        return self.store.engine

    # Entities

    async def create(
        self, data: Lifecycle, *, by: Actor, comment: str = "", correlation_id: str | None = None
    ) -> Entity:
        """Create an entity, and return it.

        Args:
            data: the entity; its class must be part of this application.
            by: who creates it.
            comment: why, for the audit trail.
            correlation_id: what it belongs to; its events carry it. By default its own id.

        Raises:
            AlreadyThereError: its business key is taken.
            NotAllowedError: this person may not create it.
            TransitionRefusedError: it is not possible so.
        """
        definition = data.definition
        await self.store.clock.calibrate_if_old()
        async with transaction(self.engine) as connection:
            act = await self._act(connection, definition.creation.name, by, comment=comment)
            moved = create(definition, data, act, id=self._ids.new(), correlation_id=correlation_id)
            self.definitions.of(moved.entity)
            written = await self.store.insert(connection, moved)
            if written is None:
                raise AlreadyThereError(f"there is a {definition.name} with the key {moved.entity.key!r} already")
            after_commit = await self.send(connection, [self.outbound(moved)])
        after_commit()
        return written

    async def act(
        self,
        lifecycle: str,
        key: str,
        transition: str,
        *,
        by: Actor,
        comment: str = "",
        revision: int | None = None,
        edits: Mapping[str, Any] | None = None,
    ) -> Entity:
        """Take a transition, and return the entity as it is then.

        Args:
            lifecycle: the name of the life cycle.
            key: the business key of the entity.
            transition: its name.
            by: who takes it.
            comment: why, for the audit trail.
            revision: the revision that was looked at; without it, what was decided on may have changed since.
            edits: new values of fields.

        Raises:
            NoSuchEntityError: there is no such entity.
            MovedOnError: it has changed since it was looked at.
            NotAllowedError: this person may not do this.
            TransitionRefusedError: it is not possible as it stands.
        """
        await self.store.clock.calibrate_if_old()
        async with transaction(self.engine) as connection:
            entity = await self.store.load(connection, lifecycle, key)
            if entity is None:
                raise NoSuchEntityError(f"there is no {lifecycle} with the key {key!r}")
            act = await self._act(
                connection, transition, by, comment=comment, revision=revision, edits=dict(edits or {})
            )
            moved = move(self.definitions.of(entity), entity, act)
            async with together(connection):
                [written] = await self.store.update(connection, [moved])
                after_commit = await self.send(connection, [self.outbound(moved)])
        after_commit()
        return written

    async def find(self, lifecycle: str, key: str) -> Entity:
        """Return an entity.

        Raises:
            NoSuchEntityError: there is none.
        """
        entity = await self.store.find(lifecycle, key)
        if entity is None:
            raise NoSuchEntityError(f"there is no {lifecycle} with the key {key!r}")
        return entity

    async def waiting_for(self, by: Actor, limit: int = 50) -> Sequence[Entity]:
        """Return the entities in whose state `by` has a role that allows something, those that wait longest first.

        What is each one's own to do, or takes a second pair of eyes, only `act` says.
        """
        return await self.store.waiting(self.definitions.waiting_for(by.roles), (*by.roles, by.user), limit)

    async def _act(self, connection: AsyncConnection, transition: str, by: Actor, **about: Any) -> Act:
        now = self.store.clock.now()
        delegations = await self.store.delegations_at(connection, now)
        return Act(transition, by, now, delegations=delegations, **about)

    # Delegations

    async def delegate(
        self,
        from_user: str,
        to_user: str,
        role: str,
        *,
        by: Actor,
        starts_at: datetime | None = None,
        ends_at: datetime,
        why: str,
        lifecycle: str | None = None,
    ) -> Delegation:
        """Let `to_user` act for `from_user` in one role, for a time.

        Args:
            from_user: whose role it is.
            to_user: who stands in.
            role: the role.
            by: who makes it: `from_user` himself, who has the role, or an administrator.
            starts_at: from when it holds; by default from now.
            ends_at: until when, itself excluded.
            why: the reason, for the record.
            lifecycle: the life cycle that it is limited to; all by default.

        Raises:
            NotAllowedError: this person may not do this.
            ConfigurationError: it would never hold, or no reason is given.
        """
        if lifecycle is not None:
            self.definitions.newest(lifecycle)
        own = by.user == from_user and by.acting_for is None and role in by.roles
        if not own and not _is_administrator(by):
            raise NotAllowedError(
                f"{by} may not delegate the role {role} of {from_user}: that takes {from_user}, with the role, or an"
                f" {ADMINISTRATOR}"
            )
        Actor(to_user, {role}, acting_for=from_user)  # refuses names that are none, and two that are one
        if not why.strip():
            raise ConfigurationError("say why the role is delegated: that is kept")
        await self.store.clock.calibrate_if_old()
        now = self.store.clock.now()
        delegation = Delegation(
            self._ids.new(), from_user, to_user, role, lifecycle, starts_at or now, ends_at, str(by), now, why
        )
        if delegation.ends_at <= max(delegation.starts_at, now):
            raise ConfigurationError(f"a delegation that ends at {ends_at} would never hold")
        async with transaction(self.engine) as connection:
            await self.store.add_delegation(connection, delegation)
        return delegation

    async def revoke(self, delegation: UUID, *, by: Actor) -> None:
        """Take a delegation back, from now on: who made it possible may, who holds it, and an administrator.

        Raises:
            ConfigurationError: there is no such delegation, or it is taken back already.
            NotAllowedError: this person may not do this.
        """
        await self.store.clock.calibrate_if_old()
        async with transaction(self.engine) as connection:
            found = await self.store.load_delegation(connection, delegation)
            if found is None or found.revoked_at is not None:
                raise ConfigurationError(f"there is no delegation {delegation} that could be taken back")
            if by.user not in (found.from_user, found.to_user) and not _is_administrator(by):
                raise NotAllowedError(f"{by} may not take back what {found.from_user} has delegated to {found.to_user}")
            await self.store.revoke(connection, delegation, by=str(by), at=self.store.clock.now())

    # For timers as well

    def outbound(self, moved: Moved) -> Outbound | None:
        """Return the event of a move, ready to be sent; None if it has none. The same move has the same event id.

        Raises:
            TooLargeError, InvalidMessageError: no receiver would take it.
        """
        entity, event = moved.entity, moved.event
        if event is None:
            return None
        with tracing.created(event.message_type) as context:
            envelope = wrap(
                event,
                id=str(derive_id(entity.id, "lifecycle", entity.revision)),
                source=self._source,
                time=self._clock.now(),
                correlation_id=entity.correlation_id or str(entity.id),
                causation_id=moved.entry.message_id,
                traceparent=context.traceparent,
                tracestate=context.tracestate,
            )
        outbound = Outbound(envelope, route(event), event.bundle_limit)
        outbound.encode(self._limits)
        return outbound

    async def send(self, connection: AsyncConnection, messages: Iterable[Outbound | None]) -> AfterCommit:
        """Write the events there are to the outbox. May stand in a block of `together`."""
        return await self._outbox.write(connection, [each for each in messages if each is not None])


def _is_administrator(by: Actor) -> bool:
    """Say whether somebody is an administrator himself: who acts for another person has none of his own roles."""
    return by.acting_for is None and ADMINISTRATOR in by.roles
