"""What Alembic runs: revisions on the connection it is given, within its transaction."""

from __future__ import annotations

from alembic import context

from coordinator.store.schema import META

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=META,
    render_as_batch=True,  # SQLite alters tables by writing them anew
    transactional_ddl=True,
)
context.run_migrations()
