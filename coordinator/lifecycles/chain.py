"""A chain of hashes over an entity's audit trail: no entry can be changed, removed or moved unnoticed. Pure.

The hash of an entry is SHA-256 over the hash of the one before (nothing for the first) and a JSON array of the values
of `COLUMNS`; a time is microseconds since 1970. The entity keeps the hash of its last entry.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

from pydantic_core import to_json

from coordinator.lifecycles.entity import Entity, Kind, Moved, Signature

COLUMNS = (
    "entity_id",
    "revision",
    "kind",
    "at",
    "from_state",
    "to_state",
    "transition",
    "actor",
    "acting_for",
    "roles",
    "role",
    "delegation_id",
    "comment",
    "message_id",
    "votes",
    "change",
)
GENESIS = b""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def audit_row(moved: Moved) -> tuple[Any, ...]:
    """Return the entry of a move as it is stored: the values of `COLUMNS`, and the hash."""
    entity, e = moved.entity, moved.entry
    by = e.by
    row = (
        entity.id,
        entity.revision,
        e.kind.value,
        e.at,
        e.from_state,
        e.to_state,
        e.transition,
        by and by.user,
        by and by.acting_for,
        sorted(by.roles) if by else [],
        e.role,
        e.delegation,
        e.comment,
        e.message_id,
        list(e.votes),
        dict(e.change),
    )
    return (*row, seal(entity.head, row))


def seal(head: bytes, row: Sequence[Any]) -> bytes:
    """Return the hash of an entry, given the one before it and its values of `COLUMNS`."""
    values = [(value - _EPOCH) // _MICROSECOND if isinstance(value, datetime) else value for value in row]
    return sha256(head + to_json(values)).digest()


def broken(entity: Entity, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Say what is wrong with an entity and its audit trail, oldest entry first; None if they are as they were written.

    Only who can write the whole chain anew, and the entity with it, is not found out.
    """
    head, told = GENESIS, _Told()
    for revision, row in enumerate(rows, 1):
        if row["revision"] != revision:
            return f"entry {revision} is missing"
        head = seal(head, [row[name] for name in COLUMNS])
        if head != row["hash"]:
            return f"entry {revision} is not as it was written, or one before it is not"
        if row["from_state"] != told.state:
            return f"entry {revision} does not begin where the one before has ended"
        told.take(row)
    if len(rows) != entity.revision or head != entity.head:
        return f"it is at revision {entity.revision}, its audit trail at {len(rows)}, and they do not end in one hash"
    if told.state != entity.state:
        return f"it is {entity.state}, which its audit trail does not say"
    differing = [each.name for each in fields(told) if getattr(told, each.name) != getattr(entity, each.name)]
    return f"its {' and '.join(differing)} are not what its audit trail says" if differing else None


@dataclass(slots=True)
class _Told:
    """An entity as its audit trail tells it: all that decides who may do what with it."""

    state: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    votes: dict[str, list[Signature]] = field(default_factory=dict)
    signatures: dict[str, list[Signature]] = field(default_factory=dict)
    escalated_to: str | None = None
    entered_at: datetime | None = None

    def take(self, row: Mapping[str, Any]) -> None:
        """Take the next entry."""
        self.state, self.data = row["to_state"], {**self.data, **row["change"]}
        kind, name, signature = Kind(row["kind"]), row["transition"], (row["actor"], row["acting_for"])
        if kind in (Kind.CREATED, Kind.MOVED):
            self.votes, self.escalated_to, self.entered_at = {}, None, row["at"]
        elif kind is Kind.VOTED:
            self.votes = {**self.votes, name: [*self.votes.get(name, ()), signature]}
        elif kind is Kind.ESCALATED:
            to = self.data.get(row["role"], row["role"])  # a role, or the field that names a person
            self.escalated_to = str(to) if to else None
        if name is not None:
            signed = dict.fromkeys((*self.signatures.get(name, ()), signature))
            self.signatures = {**self.signatures, name: list(signed)}
