"""What handlers need that hold: messages that wait to be tried again, settings at run time, more of dead letters."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from events.tables import Timestamp

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_is_dead = sa.text("status = 'dead'")
_is_replayed = sa.text("dead_letter_id IS NOT NULL")


def _added() -> list[sa.Column[Any]]:
    return [
        sa.Column("error_type", sa.Text()),
        sa.Column("first_at", Timestamp()),
        sa.Column("fingerprint", sa.Text(), nullable=False, server_default=""),
        sa.Column("status", sa.Text(), nullable=False, server_default="dead"),
        sa.Column("settled_at", Timestamp()),
        sa.Column("settled_by", sa.Text()),
        sa.Column("settled_why", sa.Text()),
        sa.Column("edited_body", sa.LargeBinary()),
    ]


def upgrade() -> None:
    """Create tables and columns."""
    with op.batch_alter_table("dead_letter") as table:
        for column in _added():
            table.add_column(column)
    with op.batch_alter_table("dead_letter") as table:  # what is there now has a value, and new rows bring one
        table.alter_column("fingerprint", server_default=None)
        table.alter_column("status", server_default=None)
    for name, columns in (("ix_dead_letter_open", ["consumer", "id"]), ("ix_dead_letter_saga", ["saga_id", "id"])):
        op.create_index(name, "dead_letter", columns, postgresql_where=_is_dead, sqlite_where=_is_dead)
    with op.batch_alter_table("inbox") as table:
        table.add_column(sa.Column("content", sa.LargeBinary()))
    with op.batch_alter_table("saga_history") as table:
        table.add_column(sa.Column("actor", sa.Text()))
        table.add_column(sa.Column("why", sa.Text()))
    op.create_table(
        "retry",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("consumer", sa.Text(), nullable=False),
        sa.Column("message_key", sa.Uuid(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("content", sa.LargeBinary()),
        sa.Column("content_type", sa.Text()),
        sa.Column("headers", _Json, nullable=False),
        sa.Column("message_id", sa.Text(), nullable=False),
        sa.Column("message_type", sa.Text(), nullable=False),
        sa.Column("saga_id", sa.Uuid()),
        sa.Column("traceparent", sa.Text()),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("first_at", Timestamp(), nullable=False),
        sa.Column("begun_at", Timestamp()),
        sa.Column("due_at", Timestamp(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("error_type", sa.Text()),
        sa.Column("detail", sa.Text()),
        sa.Column("dead_letter_id", sa.Uuid()),
        sa.PrimaryKeyConstraint("id", name="pk_retry"),
        # Rows come and go: let vacuum keep the table short.
        postgresql_with={"autovacuum_vacuum_scale_factor": "0.01", "autovacuum_vacuum_threshold": "1000"},
    )
    op.create_index("uq_retry_message_key_consumer", "retry", ["message_key", "consumer"], unique=True)
    op.create_index("ix_retry_consumer_due_at", "retry", ["consumer", "due_at"])
    op.create_index(
        "ix_retry_replayed",
        "retry",
        ["saga_id", "dead_letter_id"],
        postgresql_where=_is_replayed,
        sqlite_where=_is_replayed,
    )
    op.create_table(
        "handler_setting",
        sa.Column("handler", sa.Text(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("rate", sa.Float()),
        sa.Column("concurrency", sa.Integer()),
        sa.Column("retry", _Json, nullable=False),
        sa.Column("changed_at", Timestamp(), nullable=False),
        sa.Column("changed_by", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("handler", name="pk_handler_setting"),
    )
    op.create_table(
        "handler_change",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("handler", sa.Text(), nullable=False),
        sa.Column("change", _Json, nullable=False),
        sa.Column("changed_at", Timestamp(), nullable=False),
        sa.Column("changed_by", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_handler_change"),
    )
    op.create_index("ix_handler_change_handler_id", "handler_change", ["handler", "id"])
    op.create_table(
        "handler_process",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("started_at", Timestamp(), nullable=False),
        sa.Column("seen_at", Timestamp(), nullable=False),
        sa.Column("handlers", _Json, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_handler_process"),
    )


def downgrade() -> None:
    """Drop tables and columns."""
    for table in ("handler_process", "handler_change", "handler_setting", "retry"):
        op.drop_table(table)
    with op.batch_alter_table("saga_history") as history:
        history.drop_column("why")
        history.drop_column("actor")
    with op.batch_alter_table("inbox") as inbox:
        inbox.drop_column("content")
    for name in ("ix_dead_letter_saga", "ix_dead_letter_open"):
        op.drop_index(name, "dead_letter")
    with op.batch_alter_table("dead_letter") as dead_letter:
        for column in reversed(_added()):
            dead_letter.drop_column(column.name)
