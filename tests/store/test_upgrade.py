from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text

import store.upgrade
from store.connection import Database
from store.database import open_store
from store.errors import InvalidInput, MismatchError
from store.records import ApiKey, TaskRecord
from store.revision import HEAD, VERSION_TABLE, current_revision
from store.schema import Row
from store.upgrade import config, upgrade, write_migration

NEXT = f"{int(HEAD) + 1:04}"  # the revision after the newest
LATER = '''
"""A step of the future."""

import sqlalchemy as sa
from alembic import op

revision = "{next}"
down_revision = "{head}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tasks", sa.Column("colour", sa.Text(), nullable=False, server_default="green"))
    {then}


def downgrade() -> None:
    op.drop_column("tasks", "colour")
'''


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def migrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the migrations that a test may add to."""
    copy = tmp_path / "migrations"
    shutil.copytree(store.upgrade.MIGRATIONS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(store.upgrade, "MIGRATIONS", copy)
    return copy / "versions"


def tables(database: Database) -> set[str]:
    with database.read() as session:
        return set(inspect(session.connection()).get_table_names())


def test_the_migrations_make_what_the_code_expects(database_url: str) -> None:
    open_store(database_url).close()
    engine = create_engine(database_url)
    with engine.connect() as connection:
        settings = {"compare_type": True, "compare_server_default": True, "version_table": VERSION_TABLE}
        context = MigrationContext.configure(connection, opts=settings)
        assert compare_metadata(context, Row.metadata) == []
    engine.dispose()


def test_checks_and_cascades_are_the_same_in_code_and_migrations(tmp_path: Path) -> None:
    """What Alembic's comparison does not look at, SQLite tells as text."""

    def made(url: str) -> dict[str, set[str]]:
        engine = create_engine(url)
        with engine.connect() as connection:
            rows = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'table'")).all()
        engine.dispose()
        words = r"CONSTRAINT (?:.(?!CONSTRAINT))*"
        return {
            name: {c.strip(" ,)\n\t") for c in re.findall(words, sql, re.DOTALL)}
            for name, sql in rows
            if name != VERSION_TABLE
        }

    open_store(f"sqlite:///{tmp_path / 'migrated.db'}").close()
    engine = create_engine(f"sqlite:///{tmp_path / 'created.db'}")
    Row.metadata.create_all(engine)
    engine.dispose()
    created = made(f"sqlite:///{tmp_path / 'created.db'}")
    assert made(f"sqlite:///{tmp_path / 'migrated.db'}") == created
    assert any("ON DELETE CASCADE" in one for one in created["profiles"])
    assert any("CHECK" in one for one in created["jobs"])


def test_the_newest_migration_is_the_one_the_code_expects(database: Database) -> None:
    with database.read() as session:
        scripts = ScriptDirectory.from_config(config(session.connection()))
    assert scripts.get_heads() == [HEAD]
    files = {Path(script.path).name for script in scripts.walk_revisions()}
    assert all(re.fullmatch(r"m\d{4}_\w+\.py", file) for file in files)


def test_an_older_store_is_brought_up_to_date_and_keeps_its_rows(
    database_url: str, database: Database, migrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(database_url) as opened:
        opened.tasks.put(TaskRecord("sql", "tables"))
    (migrations / f"m{NEXT}_later.py").write_text(LATER.format(next=NEXT, head=HEAD, then="pass"))
    monkeypatch.setattr("store.revision.HEAD", NEXT)
    with open_store(database_url) as opened:
        assert opened.tasks.list() == [TaskRecord("sql", "tables")]
    with database.read() as session:
        assert current_revision(session.connection()) == NEXT
        assert session.execute(text("SELECT colour FROM tasks")).scalar() == "green"


def test_a_migration_that_fails_leaves_the_store_as_it_was(
    database_url: str, database: Database, migrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(database_url) as opened:
        opened.tasks.put(TaskRecord("sql", "tables"))
    (migrations / f"m{NEXT}_later.py").write_text(LATER.format(next=NEXT, head=HEAD, then="raise ZeroDivisionError"))
    monkeypatch.setattr("store.revision.HEAD", NEXT)
    with pytest.raises(ZeroDivisionError):
        open_store(database_url)
    monkeypatch.undo()
    with database.read() as session:
        assert "colour" not in {column["name"] for column in inspect(session.connection()).get_columns("tasks")}
    with open_store(database_url) as opened:
        assert opened.tasks.list() == [TaskRecord("sql", "tables")]


def test_a_first_migration_that_fails_leaves_an_empty_database(
    database_url: str, database: Database, migrations: Path
) -> None:
    (migrations / f"m{NEXT}_later.py").write_text(LATER.format(next=NEXT, head=HEAD, then="raise ZeroDivisionError"))
    with pytest.raises(ZeroDivisionError):
        open_store(database_url)
    assert tables(database) == set()


def test_going_down_and_up_again_ends_where_it_began(database_url: str, database: Database) -> None:
    open_store(database_url).close()
    before = tables(database)
    with database.write() as session:
        command.downgrade(config(session.connection()), "base")
    assert tables(database) == {VERSION_TABLE}
    with database.write() as session:
        upgrade(session.connection(), "again")
    assert tables(database) == before


def test_keys_of_an_older_store_may_use_every_task(database_url: str, database: Database) -> None:
    key = ApiKey("a", "x", "query", "1" * 64, None, datetime(2026, 1, 2, tzinfo=UTC))
    with open_store(database_url) as opened:
        opened.keys.put(key)
    with database.write() as session:
        command.downgrade(config(session.connection()), "0007")
    with open_store(database_url) as opened:
        assert opened.keys.list() == [key]


def test_a_store_of_a_newer_moepager_is_refused_and_left_alone(
    database_url: str, database: Database, run_sql: Callable[[str], None]
) -> None:
    with open_store(database_url) as opened:
        opened.tasks.put(TaskRecord("sql"))
    run_sql(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")  # noqa: S608
    with pytest.raises(MismatchError, match=r"revision '9999'.*a newer one wrote it.*Upgrade moepager"):
        open_store(database_url)
    with database.read() as session:
        assert session.execute(text("SELECT name FROM tasks")).scalar() == "sql"
        assert current_revision(session.connection()) == "9999"


def test_a_database_of_another_program_is_refused_and_left_alone(
    database_url: str, database: Database, run_sql: Callable[[str], None]
) -> None:
    run_sql("CREATE TABLE tasks (chore TEXT)")
    with pytest.raises(InvalidInput, match=r"belongs to another program: it has the tables tasks.*of its own"):
        open_store(database_url)
    assert tables(database) == {"tasks"}


def test_a_new_migration_is_written_from_what_the_tables_lack(
    migrations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = migrations / "m0001_the_first_tables.py"
    first.write_text(first.read_text().replace('        sa.Column("description", sa.Text(), nullable=False),\n', ""))
    write_migration("tasks have descriptions")
    written = (migrations / f"m{NEXT}_tasks_have_descriptions.py").read_text()
    assert "sa.Column('description', sa.Text(), nullable=False)" in written
    assert written.count("add_column") == written.count("drop_column") == 1
    assert f"m{NEXT}" in capsys.readouterr().out


def test_of_several_jobs_of_a_task_that_had_not_ended_one_is_left(database_url: str, database: Database) -> None:
    with database.write() as session:
        upgrade(session.connection(), database.name, "0010")
        for name, state, hour in (
            ("old", "queued", 1),
            ("runs", "running", 2),
            ("new", "queued", 3),
            ("done", "done", 0),
        ):
            session.execute(
                text(
                    "INSERT INTO jobs (id, model, task, state, progress, detail, created, updated) "
                    "VALUES (:id, 'm', 't', :state, 0, '', :at, :at)"
                ),
                {"id": name, "state": state, "at": f"2025-03-01 0{hour}:00:00"},
            )
    with open_store(database_url) as opened:
        states = {job.id: job.state for job in opened.jobs.list()}
    assert states == {"old": "cancelled", "runs": "running", "new": "cancelled", "done": "done"}
