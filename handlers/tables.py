"""The tables of this package."""

from sqlalchemy import Column, Index, LargeBinary, Table, Text, Uuid

from events.tables import Timestamp, metadata

# Messages that a consumer has handled, with the replies it gave: a duplicate gets the same replies again.
inbox = Table(
    "inbox",
    metadata,
    Column("message_key", Uuid, primary_key=True),
    Column("consumer", Text, primary_key=True),
    Column("reply", LargeBinary),
    Column("reply_to", Text),
    Column("handled_at", Timestamp, nullable=False),
    Index(None, "handled_at"),
)
