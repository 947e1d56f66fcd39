"""How a saga had ended when it published its event: what is woken by late news does not say it twice."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; those that have ended have said so."""
    op.add_column("saga_instance", sa.Column("announced", sa.Text()))
    op.execute("UPDATE saga_instance SET announced = status WHERE status IN ('completed', 'compensated')")


def downgrade() -> None:
    """Drop the column."""
    with op.batch_alter_table("saga_instance") as table:
        table.drop_column("announced")
