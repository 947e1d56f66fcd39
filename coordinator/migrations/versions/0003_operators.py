"""What operators need: a saga's own deadline as data, so that it can be moved."""

import sqlalchemy as sa
from alembic import op

from events.tables import Timestamp

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column. Sagas that are in flight turn back for their steps' deadlines only."""
    with op.batch_alter_table("saga_instance") as table:
        table.add_column(sa.Column("deadline", Timestamp()))


def downgrade() -> None:
    """Drop the column."""
    with op.batch_alter_table("saga_instance") as table:
        table.drop_column("deadline")
