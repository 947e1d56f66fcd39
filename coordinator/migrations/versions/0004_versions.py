"""What each version of a saga was like when it was first run."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from events.tables import Timestamp

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "saga_version",
        sa.Column("saga", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("structure", _Json, nullable=False),
        sa.Column("first_seen", Timestamp(), nullable=False),
        sa.PrimaryKeyConstraint("saga", "version", name="pk_saga_version"),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("saga_version")
