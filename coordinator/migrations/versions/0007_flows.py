"""What flows need: items of fan-outs, what instances wait for, events that are early, and children."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from events.tables import Timestamp

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_has_deadline = sa.text("due_at IS NOT NULL")


def upgrade() -> None:
    """Create tables and columns."""
    with op.batch_alter_table("saga_instance") as table:
        table.add_column(sa.Column("turned_back", sa.Boolean(), nullable=False, server_default=sa.false()))
        table.add_column(sa.Column("origin", _Json))
    # Only a saga that has turned back has compensations.
    op.execute(
        "UPDATE saga_instance SET turned_back = true WHERE status IN ('compensating', 'compensated')"
        " OR status = 'needs_attention' AND CAST(steps AS TEXT) LIKE '%undo_attempt%'"
    )
    op.create_table(
        "saga_item",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("saga_id", sa.Uuid(), nullable=False),
        sa.Column("step", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("state", _Json, nullable=False),
        sa.Column("due_at", Timestamp()),
        sa.ForeignKeyConstraint(["saga_id"], ["saga_instance.id"], name="fk_saga_item_saga_id"),
        sa.PrimaryKeyConstraint("id", name="pk_saga_item"),
    )
    op.create_index("uq_saga_item_saga_id_step_number", "saga_item", ["saga_id", "step", "number"], unique=True)
    op.create_index(
        "ix_saga_item_due_at", "saga_item", ["due_at"], postgresql_where=_has_deadline, sqlite_where=_has_deadline
    )
    op.create_table(
        "saga_wait",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("correlation", sa.Uuid(), nullable=False),
        sa.Column("saga_id", sa.Uuid(), nullable=False),
        sa.Column("step", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("since", Timestamp(), nullable=False),
        sa.ForeignKeyConstraint(["saga_id"], ["saga_instance.id"], name="fk_saga_wait_saga_id"),
        sa.PrimaryKeyConstraint("id", name="pk_saga_wait"),
    )
    op.create_index("ix_saga_wait_correlation", "saga_wait", ["correlation"])
    op.create_index("ix_saga_wait_saga_id", "saga_wait", ["saga_id"])
    op.create_table(
        "parked_event",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("correlation", sa.Uuid(), nullable=False),
        sa.Column("saga", sa.Text(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("parked_at", Timestamp(), nullable=False),
        sa.Column("expires_at", Timestamp(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_parked_event"),
    )
    op.create_index("ix_parked_event_correlation", "parked_event", ["correlation"])
    op.create_index("ix_parked_event_expires_at", "parked_event", ["expires_at"])


def downgrade() -> None:
    """Drop tables and columns."""
    for table in ("parked_event", "saga_wait", "saga_item"):
        op.drop_table(table)
    with op.batch_alter_table("saga_instance") as instance:
        instance.drop_column("origin")
        instance.drop_column("turned_back")
