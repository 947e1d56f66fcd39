"""What the shipped handlers keep in the database."""

from sqlalchemy import CheckConstraint, Column, Integer, MetaData, Table, Text, Uuid

metadata = MetaData()

user_setting = Table(
    "user_setting",
    metadata,
    Column("user_id", Uuid, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Text, nullable=False),
)

stock_item = Table(
    "stock_item",
    metadata,
    Column("sku", Text, primary_key=True),
    Column("available", Integer, CheckConstraint("available >= 0"), nullable=False),
)

# A reservation is kept after it was released, as a tombstone: one that arrives later is refused.
stock_reservation = Table(
    "stock_reservation",
    metadata,
    Column("order_id", Uuid, primary_key=True),
    Column("sku", Text),
    Column("quantity", Integer, nullable=False),
    Column("state", Text, CheckConstraint("state IN ('reserved', 'released')"), nullable=False),
)
