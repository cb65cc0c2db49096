"""Alembic's entry: runs the migrations on the connection that `store.upgrade` hands over, inside its transaction."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext

from store.revision import VERSION_TABLE
from store.schema import Row, UtcDateTime


def render(kind: str, item: Any, _autogen: AutogenContext) -> str | Literal[False]:
    """Migrations name plain types: they must run when the class of today is gone."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UtcDateTime) else False


connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Row.metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,  # true of SQLite too, since the transaction is begun by hand
    render_as_batch=connection.dialect.name == "sqlite",  # SQLite alters a table by copying it
    render_item=render,
)
with context.begin_transaction():
    context.run_migrations()
