"""The first schema: outbox, inbox, dead letters, saga instances and their history."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from events.tables import Timestamp

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_has_deadline = sa.text("due_at IS NOT NULL")
_in_flight = sa.text("status IN ('running', 'compensating')")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "outbox",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("exchange", sa.Text(), nullable=False),
        sa.Column("routing_key", sa.Text(), nullable=False),
        sa.Column("bundle", sa.SmallInteger(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("traceparent", sa.Text()),
        sa.Column("tracestate", sa.Text()),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("due_at", Timestamp(), nullable=False),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
        # Rows come and go: let vacuum keep the table short.
        postgresql_with={"autovacuum_vacuum_scale_factor": "0.01", "autovacuum_vacuum_threshold": "1000"},
    )
    op.create_table(
        "dead_letter",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("consumer", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("content_type", sa.Text()),
        sa.Column("headers", _Json, nullable=False),
        sa.Column("message_id", sa.Text()),
        sa.Column("message_type", sa.Text()),
        sa.Column("saga_id", sa.Uuid()),
        sa.Column("traceparent", sa.Text()),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("dead_at", Timestamp(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_dead_letter"),
    )
    op.create_index("ix_dead_letter_dead_at", "dead_letter", ["dead_at"])
    op.create_table(
        "inbox",
        sa.Column("message_key", sa.Uuid(), nullable=False),
        sa.Column("consumer", sa.Text(), nullable=False),
        sa.Column("reply", sa.LargeBinary()),
        sa.Column("reply_to", sa.Text()),
        sa.Column("handled_at", Timestamp(), nullable=False),
        sa.PrimaryKeyConstraint("message_key", "consumer", name="pk_inbox"),
    )
    op.create_index("ix_inbox_handled_at", "inbox", ["handled_at"])
    op.create_table(
        "saga_instance",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("saga", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("state", _Json, nullable=False),
        sa.Column("steps", _Json, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("due_at", Timestamp()),
        sa.Column("reason", sa.Text()),
        sa.Column("traceparent", sa.Text()),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("updated_at", Timestamp(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_saga_instance"),
        postgresql_with={"fillfactor": "80", "autovacuum_vacuum_scale_factor": "0.02"},
    )
    op.create_index("uq_saga_instance_saga_key", "saga_instance", ["saga", "key"], unique=True)
    op.create_index(
        "ix_saga_instance_due_at",
        "saga_instance",
        ["due_at"],
        postgresql_where=_has_deadline,
        sqlite_where=_has_deadline,
    )
    op.create_index(
        "ix_saga_instance_in_flight",
        "saga_instance",
        ["saga", "id"],
        postgresql_where=_in_flight,
        sqlite_where=_in_flight,
    )
    op.create_table(
        "saga_history",
        sa.Column("saga_id", sa.Uuid(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("at", Timestamp(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("step", sa.Text()),
        sa.Column("direction", sa.Text()),
        sa.Column("attempt", sa.Integer()),
        sa.Column("result", sa.Text()),
        sa.Column("message_id", sa.Text()),
        sa.Column("reason", sa.Text()),
        sa.Column("change", _Json, nullable=False),
        sa.Column("sent", _Json, nullable=False),
        sa.ForeignKeyConstraint(["saga_id"], ["saga_instance.id"], name="fk_saga_history_saga_id"),
        sa.PrimaryKeyConstraint("saga_id", "revision", name="pk_saga_history"),
    )


def downgrade() -> None:
    """Drop the tables."""
    for table in ("saga_history", "saga_instance", "inbox", "dead_letter", "outbox"):
        op.drop_table(table)
