"""What goes into a move and what comes out of it: people, delegations, entities, the audit trail. Only data."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any
from unicodedata import normalize
from uuid import UUID

from events.errors import CoordinatorError
from events.message import Event

MAX_NAME = 200  # characters of the name of a person or a role
MAX_COMMENT = 4000

Signature = tuple[str, str | None]  # who did something, and for whom


class TransitionRefusedError(CoordinatorError):
    """The transition is not possible as the entity stands; the text says why, and what is."""

    code = "transition_refused"


class NotAllowedError(CoordinatorError):
    """This person may not do this; the text says who may."""

    code = "not_allowed"


class MovedOnError(CoordinatorError):
    """The entity has changed since it was looked at; look at it again and decide again."""

    code = "moved_on"


@dataclass(frozen=True, slots=True)
class Actor:
    """Who acts. Whoever makes one vouches for it: a login, a token, an operator at the command line.

    Attributes:
        user: the person; one person has one name, everywhere.
        roles: the roles that he has himself.
        acting_for: whom he stands in for; his own roles do not count then, but those that were delegated to him.

    Raises:
        NotAllowedError: a name is none.
    """

    user: str
    roles: AbstractSet[str] = frozenset()
    acting_for: str | None = None

    def __post_init__(self) -> None:
        for name in (*self.persons, *self.roles):
            if not name.strip() or name != name.strip() or not name.isprintable() or len(name) > MAX_NAME:
                raise NotAllowedError(
                    f"{name[:MAX_NAME]!r} names no person and no role: that takes 1 to {MAX_NAME} printable characters"
                )
        if len(self.persons) > 1 and folded(self.user) == folded(self.persons[1]):
            raise NotAllowedError(f"{self.user} needs nobody to stand in for him")

    @property
    def persons(self) -> tuple[str, ...]:
        """Everybody whose decision this is: the person, and whom he stands in for."""
        return (self.user,) if self.acting_for is None else (self.user, self.acting_for)

    def __str__(self) -> str:
        return self.user if self.acting_for is None else f"{self.user} for {self.acting_for}"


@dataclass(frozen=True, slots=True)
class Delegation:
    """One person stands in for another one, in one role, for a time.

    Attributes:
        lifecycle: the life cycle that it is limited to; None for all.
        starts_at, ends_at: when it holds, the end excluded.
        made_by: who made it, and
        why: the reason.
        revoked_at: when it was taken back, by `revoked_by`.
    """

    id: UUID
    from_user: str
    to_user: str
    role: str
    lifecycle: str | None
    starts_at: datetime
    ends_at: datetime
    made_by: str
    made_at: datetime
    why: str
    revoked_at: datetime | None = None
    revoked_by: str | None = None

    def holds(self, lifecycle: str, at: datetime) -> bool:
        """Say whether it counts in a life cycle at a time."""
        in_time = self.starts_at <= at < self.ends_at and (self.revoked_at is None or at < self.revoked_at)
        return in_time and self.lifecycle in (None, lifecycle)


@dataclass(frozen=True, slots=True)
class Act:
    """Somebody takes a transition.

    Attributes:
        transition: its name.
        by: who takes it.
        at: when.
        comment: why, for the audit trail.
        revision: the revision that was looked at; the act is refused if the entity has changed since.
        edits: new values of fields.
        delegations: those that hold at this time, or more; those count that were given to the persons of `by`.
        message_id: the message that asks for it; None where a person does.
    """

    transition: str
    by: Actor
    at: datetime
    comment: str = ""
    revision: int | None = None
    edits: Mapping[str, Any] = field(default_factory=dict)
    delegations: Sequence[Delegation] = ()
    message_id: str | None = None


class Kind(StrEnum):
    """What has happened to an entity."""

    CREATED = "created"
    MOVED = "moved"
    VOTED = "voted"
    REMINDED = "reminded"
    ESCALATED = "escalated"


@dataclass(frozen=True, slots=True)
class Due:
    """A deadline of a state has passed.

    Attributes:
        kind: `Kind.REMINDED` or `Kind.ESCALATED`.
        state: the state,
        entered_at: since when the entity is in it.
        at: when this was noticed.
        reminders: how many there were, this one included.
        escalated_to: the role or the person that it has been escalated to, if it has.
    """

    kind: Kind
    state: str
    entered_at: datetime
    at: datetime
    reminders: int
    escalated_to: str | None


@dataclass(frozen=True, slots=True)
class Entity:
    """Something with a life cycle, as it stands.

    Attributes:
        data: its fields as plain JSON data.
        revision: counts what has happened to it, from 1; every write names the one it follows.
        votes: who has taken which transition out of this state that still needs others.
        signatures: who has ever taken which transition.
        entered_at: since when it is in its state.
        reminders: how many there were since then.
        remind_at, escalate_at: when the next reminder is due, and the escalation.
        escalated_to: the role, or the person, that may decide, too, since it was escalated.
        correlation_id: what its messages belong to.
        head: the hash of the last entry of its audit trail that was written.
    """

    id: UUID
    lifecycle: str
    version: int
    key: str
    state: str
    data: dict[str, Any]
    revision: int
    created_at: datetime
    updated_at: datetime
    entered_at: datetime
    votes: Mapping[str, Sequence[Signature]] = field(default_factory=dict)
    signatures: Mapping[str, Sequence[Signature]] = field(default_factory=dict)
    reminders: int = 0
    remind_at: datetime | None = None
    escalate_at: datetime | None = None
    escalated_to: str | None = None
    correlation_id: str | None = None
    head: bytes = b""

    @property
    def due_at(self) -> datetime | None:
        """The earlier one of its deadlines."""
        return min((at for at in (self.remind_at, self.escalate_at) if at is not None), default=None)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """What has happened: one row for each revision of an entity.

    Attributes:
        transition: the one that was taken; None for what time does.
        by: who did it; None for what time does.
        role: the role that allowed it.
        delegation: the delegation that gave the role.
        votes: who has taken the transition together, where it needs several.
        change: the fields that were changed, with their new values.
    """

    kind: Kind
    at: datetime
    from_state: str | None
    to_state: str
    transition: str | None = None
    by: Actor | None = None
    role: str | None = None
    delegation: UUID | None = None
    comment: str = ""
    message_id: str | None = None
    votes: Sequence[Signature] = ()
    change: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Moved:
    """All that follows from an act, or from time."""

    entity: Entity
    entry: AuditEntry
    event: Event | None = None


def folded(name: str) -> str:
    """Return a person's name as it is compared where two must differ: Ann is ann, however the letters are encoded.

    What nobody sees makes no other person: blanks around it, and signs without a width, which no actor has.
    """
    seen = "".join(each for each in normalize("NFKC", name) if each.isprintable())
    return normalize("NFKC", " ".join(seen.split()).casefold())
