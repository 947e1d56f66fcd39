"""Alembic's environment: it is given a connection by `coordinator.schema`, within its transaction."""

from alembic import context

from coordinator.schema import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_as_batch=connection.dialect.name == "sqlite",
    compare_type=True,
)
context.run_migrations()
