"""What history needs: the input of each transition, a chain of hashes, indexes for keys alone and for what is stuck."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from coordinator.chain import COLUMNS, GENESIS, seal
from events.tables import Timestamp

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_Json = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_stuck = sa.text("status = 'needs_attention'")
_MANY = 1000

_history = sa.table(
    "saga_history",
    *(sa.column(name, sa.Text()) for name in COLUMNS if name not in ("saga_id", "revision", "at", "attempt")),
    sa.column("saga_id", sa.Uuid()),
    sa.column("revision", sa.Integer()),
    sa.column("at", Timestamp()),
    sa.column("attempt", sa.Integer()),
    sa.column("hash", sa.LargeBinary()),
)
_instance = sa.table("saga_instance", sa.column("id", sa.Uuid()), sa.column("head", sa.LargeBinary()))


def upgrade() -> None:
    """Add the columns, and seal what is there."""
    with op.batch_alter_table("saga_history") as history:
        for name in ("change", "sent"):  # a hash is one over text, and JSONB has no letters
            history.alter_column(name, type_=sa.Text(), existing_nullable=False, postgresql_using=f"{name}::text")
        history.add_column(sa.Column("input", sa.Text()))
        history.add_column(sa.Column("hash", sa.LargeBinary()))
    with op.batch_alter_table("saga_instance") as instance:
        instance.add_column(sa.Column("head", sa.LargeBinary()))
    _seal_all()
    with op.batch_alter_table("saga_history") as history:
        history.alter_column("hash", nullable=False)
    with op.batch_alter_table("saga_instance") as instance:
        instance.alter_column("head", nullable=False)
    op.drop_index("uq_saga_instance_saga_key", "saga_instance")
    op.create_index("uq_saga_instance_key_saga", "saga_instance", ["key", "saga"], unique=True)
    op.create_index(
        "ix_saga_instance_stuck", "saga_instance", ["saga", "id"], postgresql_where=_stuck, sqlite_where=_stuck
    )


def _seal_all() -> None:
    connection = op.get_bind()
    set_hash = (
        _history.update()
        .where(_history.c.saga_id == sa.bindparam("of"), _history.c.revision == sa.bindparam("number"))
        .values(hash=sa.bindparam("sealed"))
    )
    set_head = _instance.update().where(_instance.c.id == sa.bindparam("of")).values(head=sa.bindparam("sealed"))
    for page in _pages(connection):
        hashes: list[dict[str, Any]] = []
        heads: list[dict[str, Any]] = []
        for saga_id, rows in groupby(page, key=lambda row: row.saga_id):
            head = GENESIS
            for row in rows:
                head = seal(head, row)
                hashes.append({"of": saga_id, "number": row.revision, "sealed": head})
            heads.append({"of": saga_id, "sealed": head})
        connection.execute(set_hash, hashes)
        connection.execute(set_head, heads)
    connection.execute(_instance.update().where(_instance.c.head.is_(None)).values(head=GENESIS))


def _pages(connection: sa.Connection) -> Iterator[list[sa.Row[Any]]]:
    """Return the history, saga by saga, those of many sagas at a time."""
    last = None
    while True:
        ids = sa.select(_instance.c.id).order_by(_instance.c.id).limit(_MANY)
        if last is not None:
            ids = ids.where(_instance.c.id > last)
        found = list(connection.execute(ids).scalars())
        if not found:
            return
        last = found[-1]
        columns = (_history.c[name] for name in COLUMNS)
        among = _history.c.saga_id.in_(found)
        rows = connection.execute(sa.select(*columns).where(among).order_by(_history.c.saga_id, _history.c.revision))
        if page := list(rows):
            yield page


def downgrade() -> None:
    """Drop the columns."""
    op.drop_index("ix_saga_instance_stuck", "saga_instance")
    op.drop_index("uq_saga_instance_key_saga", "saga_instance")
    op.create_index("uq_saga_instance_saga_key", "saga_instance", ["saga", "key"], unique=True)
    with op.batch_alter_table("saga_instance") as instance:
        instance.drop_column("head")
    with op.batch_alter_table("saga_history") as history:
        history.drop_column("hash")
        history.drop_column("input")
        for name in ("change", "sent"):
            history.alter_column(name, type_=_Json, existing_nullable=False, postgresql_using=f"{name}::jsonb")
