"""The tables of the coordinator: one row an instance, one row a transition."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    Uuid,
    false,
    text,
)

from events.tables import Json, JsonText, Timestamp, metadata

IN_FLIGHT = "status IN ('running', 'compensating')"  # the words of the index: SQLite uses it for no others
STUCK = "status = 'needs_attention'"
_in_flight = text(IN_FLIGHT)
_stuck = text(STUCK)
_has_deadline = text("due_at IS NOT NULL")

saga_instance = Table(
    "saga_instance",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("saga", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("key", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("state", Json, nullable=False),
    Column("steps", Json, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("due_at", Timestamp),
    Column("reason", Text),
    Column("traceparent", Text),
    Column("created_at", Timestamp, nullable=False),
    Column("updated_at", Timestamp, nullable=False),
    Column("deadline", Timestamp),
    Column("head", LargeBinary, nullable=False),  # the hash of the last row of its history
    Column("turned_back", Boolean, nullable=False, server_default=false()),
    Column("origin", Json),
    Column("announced", Text),
    Index("uq_saga_instance_key_saga", "key", "saga", unique=True),  # in this order it finds a key alone, too
    Index("ix_saga_instance_due_at", "due_at", postgresql_where=_has_deadline, sqlite_where=_has_deadline),
    Index("ix_saga_instance_in_flight", "saga", "id", postgresql_where=_in_flight, sqlite_where=_in_flight),
    Index("ix_saga_instance_stuck", "saga", "id", postgresql_where=_stuck, sqlite_where=_stuck),
    postgresql_with={"fillfactor": "80", "autovacuum_vacuum_scale_factor": "0.02"},
)

# Who waits for a business key, in the order of arrival; who stands first holds it.
saga_lock = Table(
    "saga_lock",
    metadata,
    Column("position", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("key", Text, nullable=False),
    Column("saga_id", Uuid, ForeignKey("saga_instance.id"), nullable=False),
    Index("ix_saga_lock_key_position", "key", "position"),
    Index("uq_saga_lock_saga_id", "saga_id", unique=True),
    sqlite_autoincrement=True,  # a number must not come again: it is the order
)

# What each version of a saga was like when it was first run: an instance must not find another flow than it began with.
saga_version = Table(
    "saga_version",
    metadata,
    Column("saga", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("fingerprint", Text, nullable=False),
    Column("structure", Json, nullable=False),
    Column("first_seen", Timestamp, nullable=False),
)

# One row for each item of a step that is taken for several. What fences it is the revision of its instance.
saga_item = Table(
    "saga_item",
    metadata,
    Column("id", Uuid, primary_key=True),  # derived from the other three
    Column("saga_id", Uuid, ForeignKey("saga_instance.id"), nullable=False),
    Column("step", Text, nullable=False),
    Column("number", Integer, nullable=False),
    Column("status", Text, nullable=False),
    Column("state", Json, nullable=False),
    Column("due_at", Timestamp),
    Index("uq_saga_item_saga_id_step_number", "saga_id", "step", "number", unique=True),
    Index("ix_saga_item_due_at", "due_at", postgresql_where=_has_deadline, sqlite_where=_has_deadline),
)

# What instances wait for: one row a part of a flow and event type.
saga_wait = Table(
    "saga_wait",
    metadata,
    Column("id", Uuid, primary_key=True),  # derived from the instance, the step and the event type
    Column("correlation", Uuid, nullable=False),  # what stands for saga, event type and values
    Column("saga_id", Uuid, ForeignKey("saga_instance.id"), nullable=False),
    Column("step", Text, nullable=False),
    Column("event", Text, nullable=False),
    Column("since", Timestamp, nullable=False),
    Index("ix_saga_wait_correlation", "correlation"),
    Index("ix_saga_wait_saga_id", "saga_id"),
)

# Events that no instance waits for yet.
parked_event = Table(
    "parked_event",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("correlation", Uuid, nullable=False),
    Column("saga", Text, nullable=False),
    Column("event", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("parked_at", Timestamp, nullable=False),
    Column("expires_at", Timestamp, nullable=False),
    Index("ix_parked_event_correlation", "correlation"),
    Index("ix_parked_event_expires_at", "expires_at"),
)

# Append only: nothing here is ever changed. JSON is kept as text, since its hash is one over text.
saga_history = Table(
    "saga_history",
    metadata,
    Column("saga_id", Uuid, ForeignKey("saga_instance.id"), primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("at", Timestamp, nullable=False),
    Column("status", Text, nullable=False),
    Column("step", Text),
    Column("direction", Text),
    Column("attempt", Integer),
    Column("result", Text),
    Column("message_id", Text),
    Column("reason", Text),
    Column("change", JsonText, nullable=False),
    Column("sent", JsonText, nullable=False),
    Column("actor", Text),  # the operator who did it,
    Column("why", Text),  # and his reason
    Column("input", JsonText),  # what was decided on: a message as it came, or what else an operator has said
    Column("hash", LargeBinary, nullable=False),  # see `coordinator.chain`
)
