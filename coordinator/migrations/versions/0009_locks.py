"""Lines of sagas that wait for a business key."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "saga_lock",
        sa.Column("position", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("saga_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(["saga_id"], ["saga_instance.id"], name="fk_saga_lock_saga_id"),
        sa.PrimaryKeyConstraint("position", name="pk_saga_lock"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_saga_lock_key_position", "saga_lock", ["key", "position"])
    op.create_index("uq_saga_lock_saga_id", "saga_lock", ["saga_id"], unique=True)


def downgrade() -> None:
    """Drop the table; sagas that wait must have been started or cancelled before."""
    op.drop_table("saga_lock")
