"""The tables of the coordinator: one row an instance, one row a transition."""

from sqlalchemy import Column, ForeignKey, Index, Integer, LargeBinary, Table, Text, Uuid, text

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
    Index("uq_saga_instance_key_saga", "key", "saga", unique=True),  # in this order it finds a key alone, too
    Index("ix_saga_instance_due_at", "due_at", postgresql_where=_has_deadline, sqlite_where=_has_deadline),
    Index("ix_saga_instance_in_flight", "saga", "id", postgresql_where=_in_flight, sqlite_where=_in_flight),
    Index("ix_saga_instance_stuck", "saga", "id", postgresql_where=_stuck, sqlite_where=_stuck),
    postgresql_with={"fillfactor": "80", "autovacuum_vacuum_scale_factor": "0.02"},
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
