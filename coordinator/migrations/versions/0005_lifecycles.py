"""Life cycles: entities with a state, what has happened to them, and who stands in for whom."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from events.tables import Timestamp

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_has_deadline = sa.text("due_at IS NOT NULL")


def upgrade() -> None:
    """Create tables."""
    op.create_table(
        "lifecycle_entity",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("lifecycle", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("data", _Json, nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("created_at", Timestamp(), nullable=False),
        sa.Column("updated_at", Timestamp(), nullable=False),
        sa.Column("entered_at", Timestamp(), nullable=False),
        sa.Column("votes", _Json, nullable=False),
        sa.Column("signatures", _Json, nullable=False),
        sa.Column("reminders", sa.Integer(), nullable=False),
        sa.Column("remind_at", Timestamp()),
        sa.Column("escalate_at", Timestamp()),
        sa.Column("due_at", Timestamp()),
        sa.Column("escalated_to", sa.Text()),
        sa.Column("correlation_id", sa.Text()),
        sa.Column("head", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_lifecycle_entity"),
    )
    op.create_index("uq_lifecycle_entity_lifecycle_key", "lifecycle_entity", ["lifecycle", "key"], unique=True)
    op.create_index("ix_lifecycle_entity_state", "lifecycle_entity", ["lifecycle", "state", "id"])
    op.create_index(
        "ix_lifecycle_entity_due_at",
        "lifecycle_entity",
        ["due_at"],
        postgresql_where=_has_deadline,
        sqlite_where=_has_deadline,
    )
    op.create_table(
        "lifecycle_delegation",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("from_user", sa.Text(), nullable=False),
        sa.Column("to_user", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("lifecycle", sa.Text()),
        sa.Column("starts_at", Timestamp(), nullable=False),
        sa.Column("ends_at", Timestamp(), nullable=False),
        sa.Column("made_by", sa.Text(), nullable=False),
        sa.Column("made_at", Timestamp(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("revoked_at", Timestamp()),
        sa.Column("revoked_by", sa.Text()),
        sa.PrimaryKeyConstraint("id", name="pk_lifecycle_delegation"),
    )
    op.create_index("ix_lifecycle_delegation_to_user", "lifecycle_delegation", ["to_user"])
    op.create_table(
        "lifecycle_history",
        sa.Column("entity_id", sa.Uuid(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("at", Timestamp(), nullable=False),
        sa.Column("from_state", sa.Text()),
        sa.Column("to_state", sa.Text(), nullable=False),
        sa.Column("transition", sa.Text()),
        sa.Column("actor", sa.Text()),
        sa.Column("acting_for", sa.Text()),
        sa.Column("roles", sa.Text(), nullable=False),
        sa.Column("role", sa.Text()),
        sa.Column("delegation_id", sa.Uuid()),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("message_id", sa.Text()),
        sa.Column("votes", sa.Text(), nullable=False),
        sa.Column("change", sa.Text(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("entity_id", "revision", name="pk_lifecycle_history"),
        sa.ForeignKeyConstraint(["entity_id"], ["lifecycle_entity.id"], name="fk_lifecycle_history_entity_id"),
        sa.ForeignKeyConstraint(
            ["delegation_id"], ["lifecycle_delegation.id"], name="fk_lifecycle_history_delegation_id"
        ),
    )
    op.create_index("ix_lifecycle_history_actor_at", "lifecycle_history", ["actor", "at"])
    op.create_index("ix_lifecycle_history_at", "lifecycle_history", ["at"])


def downgrade() -> None:
    """Drop tables."""
    for table in ("lifecycle_history", "lifecycle_delegation", "lifecycle_entity"):
        op.drop_table(table)
