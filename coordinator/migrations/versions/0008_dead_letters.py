"""What dead letters need: who has done what with them, and a way to find those that nobody needs any more."""

import sqlalchemy as sa
from alembic import op

from events.tables import Timestamp

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_is_settled = sa.text("status <> 'dead'")


def upgrade() -> None:
    """Create the table and the indexes. What was done before is not in it."""
    op.create_table(
        "dead_letter_change",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("dead_letter_id", sa.Uuid(), nullable=False),
        sa.Column("act", sa.Text(), nullable=False),
        sa.Column("body", sa.LargeBinary()),
        sa.Column("changed_at", Timestamp(), nullable=False),
        sa.Column("changed_by", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_dead_letter_change"),
    )
    op.create_index("ix_dead_letter_change_letter", "dead_letter_change", ["dead_letter_id", "id"])
    op.create_index(
        "ix_dead_letter_settled",
        "dead_letter",
        ["settled_at"],
        postgresql_where=_is_settled,
        sqlite_where=_is_settled,
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_index("ix_dead_letter_settled", "dead_letter")
    op.drop_table("dead_letter_change")
