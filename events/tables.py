"""The tables of this package. Each package adds its own to the same metadata."""

from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic_core import from_json, to_json
from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    DateTime,
    Dialect,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    TypeDecorator,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)


class Timestamp(TypeDecorator[datetime]):
    """A point in time with its zone: `timestamptz` on PostgreSQL, microseconds since 1970 on SQLite."""

    impl = BigInteger
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(DateTime(timezone=True))
        return dialect.type_descriptor(BigInteger())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None or dialect.name == "postgresql":
            return value
        return (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: datetime | int | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None or isinstance(value, datetime):
            return value
        return _EPOCH + value * _MICROSECOND


class JsonText(TypeDecorator[Any]):
    """JSON that is kept letter by letter. Text that is written is JSON already; what is read is parsed."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        return value if value is None or isinstance(value, str) else to_json(value).decode()

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ARG002
        return None if value is None else from_json(value)


Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")

_is_dead = text("status = 'dead'")
IS_SETTLED = text("status <> 'dead'")

# Messages that a committed transaction caused and that the bus has not confirmed yet. Rows are deleted once
# confirmed, so the table is short; `due_at` is the lease of whoever publishes a row, or the next try.
outbox = Table(
    "outbox",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("exchange", Text, nullable=False),
    Column("routing_key", Text, nullable=False),
    Column("bundle", SmallInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("traceparent", Text),
    Column("tracestate", Text),
    Column("attempts", Integer, nullable=False, default=0),
    Column("due_at", Timestamp, nullable=False),
    Column("error", Text),
    # Rows come and go: let vacuum keep the table short.
    postgresql_with={"autovacuum_vacuum_scale_factor": "0.01", "autovacuum_vacuum_threshold": "1000"},
)

# Messages that were given up on, byte for byte. `status` says what has become of them since: dead, replayed, discarded.
dead_letter = Table(
    "dead_letter",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("consumer", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("content_type", Text),
    Column("headers", Json, nullable=False),
    Column("message_id", Text),
    Column("message_type", Text),
    Column("saga_id", Uuid),
    Column("traceparent", Text),
    Column("attempts", Integer, nullable=False),
    Column("dead_at", Timestamp, nullable=False),
    Column("error_type", Text),
    Column("first_at", Timestamp),
    Column("fingerprint", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("settled_at", Timestamp),
    Column("settled_by", Text),
    Column("settled_why", Text),
    Column("edited_body", LargeBinary),
    Index(None, "dead_at"),
    Index("ix_dead_letter_open", "consumer", "id", postgresql_where=_is_dead, sqlite_where=_is_dead),
    Index("ix_dead_letter_saga", "saga_id", "id", postgresql_where=_is_dead, sqlite_where=_is_dead),
    Index("ix_dead_letter_settled", "settled_at", postgresql_where=IS_SETTLED, sqlite_where=IS_SETTLED),
)

# Append only: who has replayed, edited or discarded a letter, when and why, and of what it had died before it was
# replayed in vain; `body` is what an edit has made of it. Goes with the letter.
dead_letter_change = Table(
    "dead_letter_change",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("dead_letter_id", Uuid, nullable=False),
    Column("act", Text, nullable=False),
    Column("body", LargeBinary),
    Column("changed_at", Timestamp, nullable=False),
    Column("changed_by", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Index("ix_dead_letter_change_letter", "dead_letter_id", "id"),
)
