"""The tables of this package."""

from sqlalchemy import Boolean, Column, Float, Index, Integer, LargeBinary, Table, Text, Uuid, text

from events.tables import Json, Timestamp, metadata

# Messages that a consumer has handled, with the replies it gave: a duplicate gets the same replies again.
inbox = Table(
    "inbox",
    metadata,
    Column("message_key", Uuid, primary_key=True),
    Column("consumer", Text, primary_key=True),
    Column("reply", LargeBinary),
    Column("reply_to", Text),
    Column("content", LargeBinary),  # digest of what was handled; null where nothing is to be compared with it
    Column("handled_at", Timestamp, nullable=False),
    Index(None, "handled_at"),
)

_is_replayed = text("dead_letter_id IS NOT NULL")

# Messages that wait to be tried again, and how often they were tried. `due_at` is the next try, or the lease of the
# process that tries; `begun_at` is the begin of a try whose end nobody has recorded.
retry = Table(
    "retry",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("consumer", Text, nullable=False),
    Column("message_key", Uuid, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("content", LargeBinary),
    Column("content_type", Text),
    Column("headers", Json, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("message_type", Text, nullable=False),
    Column("saga_id", Uuid),
    Column("traceparent", Text),
    Column("attempts", Integer, nullable=False),
    Column("crashes", Integer, nullable=False),
    Column("first_at", Timestamp, nullable=False),
    Column("begun_at", Timestamp),
    Column("due_at", Timestamp, nullable=False),
    Column("reason", Text),
    Column("error_type", Text),
    Column("detail", Text),
    Column("dead_letter_id", Uuid),
    Index("uq_retry_message_key_consumer", "message_key", "consumer", unique=True),
    Index("ix_retry_consumer_due_at", "consumer", "due_at"),
    Index("ix_retry_replayed", "saga_id", "dead_letter_id", postgresql_where=_is_replayed, sqlite_where=_is_replayed),
    # Rows come and go: let vacuum keep the table short.
    postgresql_with={"autovacuum_vacuum_scale_factor": "0.01", "autovacuum_vacuum_threshold": "1000"},
)

# What an operator has set for a handler; null is what its code says.
handler_setting = Table(
    "handler_setting",
    metadata,
    Column("handler", Text, primary_key=True),
    Column("paused", Boolean, nullable=False),
    Column("rate", Float),
    Column("concurrency", Integer),
    Column("retry", Json, nullable=False),
    Column("changed_at", Timestamp, nullable=False),
    Column("changed_by", Text, nullable=False),
    Column("reason", Text, nullable=False),
)

# Append only: who has set what, when and why.
handler_change = Table(
    "handler_change",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("handler", Text, nullable=False),
    Column("change", Json, nullable=False),
    Column("changed_at", Timestamp, nullable=False),
    Column("changed_by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Index(None, "handler", "id"),
)

# The processes that run handlers, and how those are: a row that is not renewed is a process that is gone.
handler_process = Table(
    "handler_process",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started_at", Timestamp, nullable=False),
    Column("seen_at", Timestamp, nullable=False),
    Column("handlers", Json, nullable=False),
)
