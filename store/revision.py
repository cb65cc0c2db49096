"""Which shape the database has, and bringing it to the one this code expects. Alembic is loaded only for work."""

from __future__ import annotations

from sqlalchemy import Connection, inspect, text

from store.connection import Database
from store.errors import MismatchError, NotFound

HEAD = "0015"  # the newest file in store/migrations/versions; a test compares
UPGRADE_SECONDS = 3600.0  # that one statement of a migration may take, or the migration of another process before it
VERSION_TABLE = "moepager_revision"


def bring_up_to_date(database: Database) -> None:
    """Migrates in one transaction: a failure leaves the database as it was."""
    with database.read() as session:
        if current_revision(session.connection()) == HEAD:
            return
    from store.upgrade import upgrade  # noqa: PLC0415 - Alembic takes longer to import than a store to open

    with database.write(patience=UPGRADE_SECONDS) as session:
        upgrade(session.connection(), database.name)


def require_current(database: Database) -> None:
    """Changes nothing. Raises NotFound where no store is, or one to be migrated; MismatchError for a newer one."""
    with database.read() as session:
        revision = current_revision(session.connection())
    if revision is None:
        raise NotFound(f"There is no store in {database.name} yet: the first start or profile makes it.")
    if revision < HEAD:
        raise NotFound(
            f"The store {database.name} has revision {revision!r}, this moepager's is {HEAD!r}: the next start or "
            "profile migrates it. Back it up before."
        )
    if revision > HEAD:
        raise MismatchError(
            f"The store {database.name} has revision {revision!r}; this moepager knows up to {HEAD!r}. Upgrade it."
        )


def current_revision(connection: Connection) -> str | None:
    """The revision of the database, None for one that has never held a store."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    revision: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608
    return revision
