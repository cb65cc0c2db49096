"""Migrations, by Alembic: how they run, and how a new one is made. Their steps are in store/migrations/versions."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from store.connection import Database
from store.errors import InvalidInput, MismatchError
from store.revision import HEAD, VERSION_TABLE, current_revision
from store.schema import Row

MIGRATIONS = Path(__file__).parent / "migrations"
LOCK = 0x6D6F6570  # "moep": one migration at a time on a PostgreSQL server


def config(connection: Connection) -> Config:
    made = Config()
    made.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    made.set_main_option("file_template", "m%%(rev)s_%%(slug)s")
    made.attributes["connection"] = connection
    return made


def upgrade(connection: Connection, name: str, revision: str = "head") -> None:
    """Runs what is missing, inside the caller's transaction. `name` names the database in messages."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
    settings = config(connection)
    _refuse_the_future(connection, name, ScriptDirectory.from_config(settings))
    _refuse_strangers(connection, name)
    command.upgrade(settings, revision)


def _refuse_the_future(connection: Connection, name: str, scripts: ScriptDirectory) -> None:
    revision = current_revision(connection)
    known = {script.revision for script in scripts.walk_revisions()}
    if revision is not None and revision not in known:
        raise MismatchError(
            f"The store {name} has revision {revision!r}; this moepager knows up to {HEAD!r}, so a newer one wrote it. "
            "Upgrade moepager, or choose another store."
        )


def _refuse_strangers(connection: Connection, name: str) -> None:
    """A database of another program is left alone: any SQLite file with tables, any server where names collide."""
    inspector = inspect(connection)
    if inspector.has_table(VERSION_TABLE):
        return
    there = set(inspector.get_table_names())
    strangers = there if connection.dialect.name == "sqlite" else there & set(Row.metadata.tables)
    if strangers:
        raise InvalidInput(
            f"{name} belongs to another program: it has the tables {', '.join(sorted(strangers)[:5])}. "
            "Give moepager a database of its own.",
            param="store",
        )


def write_migration(message: str) -> None:
    """Writes the next file of store/migrations/versions from what schema.py has and the migrations lack."""
    with tempfile.TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{folder}/scratch.db")
        with database.write() as session:
            upgrade(session.connection(), database.name)
            number = f"{int(HEAD) + 1:04d}"
            command.revision(config(session.connection()), message, autogenerate=True, rev_id=number)
        database.close()


if __name__ == "__main__":
    write_migration(" ".join(sys.argv[1:]))
