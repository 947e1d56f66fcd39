"""The tables of life cycles: one row an entity, one row for what has happened to one, one row a delegation."""

from sqlalchemy import Column, ForeignKey, Index, Integer, LargeBinary, Table, Text, Uuid, text

from events.tables import Json, JsonText, Timestamp, metadata

_has_deadline = text("due_at IS NOT NULL")

lifecycle_entity = Table(
    "lifecycle_entity",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("lifecycle", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("key", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("data", Json, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("created_at", Timestamp, nullable=False),
    Column("updated_at", Timestamp, nullable=False),
    Column("entered_at", Timestamp, nullable=False),
    Column("votes", Json, nullable=False),
    Column("signatures", Json, nullable=False),
    Column("reminders", Integer, nullable=False),
    Column("remind_at", Timestamp),
    Column("escalate_at", Timestamp),
    Column("due_at", Timestamp),  # the earlier one of the two
    Column("escalated_to", Text),
    Column("correlation_id", Text),
    Column("head", LargeBinary, nullable=False),  # the hash of its last audit entry
    Index("uq_lifecycle_entity_lifecycle_key", "lifecycle", "key", unique=True),
    Index("ix_lifecycle_entity_state", "lifecycle", "state", "id"),
    Index("ix_lifecycle_entity_due_at", "due_at", postgresql_where=_has_deadline, sqlite_where=_has_deadline),
)

# The audit trail. Append only: nothing here is ever changed. JSON is kept as text, since there is a hash over it.
lifecycle_history = Table(
    "lifecycle_history",
    metadata,
    Column("entity_id", Uuid, ForeignKey("lifecycle_entity.id"), primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("at", Timestamp, nullable=False),
    Column("from_state", Text),
    Column("to_state", Text, nullable=False),
    Column("transition", Text),
    Column("actor", Text),  # who did it,
    Column("acting_for", Text),  # and for whom
    Column("roles", JsonText, nullable=False),  # those that he had,
    Column("role", Text),  # and the one that allowed it,
    Column("delegation_id", Uuid, ForeignKey("lifecycle_delegation.id")),  # if somebody had delegated it
    Column("comment", Text, nullable=False),
    Column("message_id", Text),
    Column("votes", JsonText, nullable=False),
    Column("change", JsonText, nullable=False),
    Column("hash", LargeBinary, nullable=False),  # see `coordinator.lifecycles.chain`
    Index("ix_lifecycle_history_actor_at", "actor", "at"),
    Index(None, "at"),
)

lifecycle_delegation = Table(
    "lifecycle_delegation",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("from_user", Text, nullable=False),
    Column("to_user", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("lifecycle", Text),
    Column("starts_at", Timestamp, nullable=False),
    Column("ends_at", Timestamp, nullable=False),
    Column("made_by", Text, nullable=False),
    Column("made_at", Timestamp, nullable=False),
    Column("why", Text, nullable=False),
    Column("revoked_at", Timestamp),
    Column("revoked_by", Text),
    Index(None, "to_user"),
)
