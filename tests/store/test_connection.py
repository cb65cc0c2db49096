from __future__ import annotations

import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

import store.connection
from store.connection import Database, parse_url
from store.database import Store, open_store
from store.errors import Busy, Conflict, CorruptStore, InvalidInput, StoreUnreachable
from store.records import Exemplar, TaskRecord


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:secret@host/db",
        "mongodb://u:secret@host",
        "redis://:secret@host",
        "oracle://secret",
        "sqlite+aiosqlite:///x",
    ],
)
def test_a_database_of_another_kind_is_refused_with_examples(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"SQLite or PostgreSQL, not in .*sqlite:///.*postgresql://") as caught:
        open_store(url)
    assert caught.value.param == "store"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["store.db", "/srv/store.db", "://", "u:secret@host"])
def test_what_is_no_url_is_refused_with_examples(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"can't be read.*sqlite:///") as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_store_in_memory_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="needs a file"):
        open_store(url)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_postgresql_goes_by_its_usual_names(scheme: str) -> None:
    assert parse_url(f"{scheme}://u@h/d").drivername == "postgresql+psycopg"


def test_passwords_are_never_shown(postgres_url: str) -> None:
    with open_store(postgres_url.replace("postgres@", "postgres:secret@")) as opened:
        assert opened.name.startswith("postgresql+psycopg://postgres:***@127.0.0.1")


def test_a_server_that_does_not_answer_is_unreachable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        with pytest.raises(StoreUnreachable, match=r"Can't use the store .*Check that the server runs") as caught:
            open_store(f"postgresql://u:secret@127.0.0.1:{taken.getsockname()[1]}/d")
    assert "secret" not in str(caught.value)


def test_a_database_that_is_not_on_the_server_is_unreachable(postgres: str) -> None:
    with pytest.raises(StoreUnreachable, match='database "nowhere" does not exist'):
        open_store(f"{postgres}/nowhere")


def test_a_file_in_no_folder_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnreachable, match="folder exists"):
        open_store(f"sqlite:///{tmp_path}/none/store.db")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(StoreUnreachable, match="unable to open"):
        open_store(f"sqlite:///{tmp_path}")


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("dear diary " * 1000)
    with pytest.raises(CorruptStore, match=r"file is not a database.*Restore it from a backup"):
        open_store(f"sqlite:///{file}")
    assert file.read_text() == "dear diary " * 1000
    assert list(tmp_path.iterdir()) == [file]


def filled(file: Path, make_exemplars: Callable[..., list[Exemplar]]) -> str:
    url = f"sqlite:///{file}"
    with open_store(url) as opened:
        opened.tasks.put(TaskRecord("sql"))
        opened.exemplars.replace("sql", make_exemplars("sql", 500, width=64))
    return url


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_a_truncated_database_is_called_damaged(
    tmp_path: Path, make_exemplars: Callable[..., list[Exemplar]], share: float
) -> None:
    file = tmp_path / "store.db"
    url = filled(file, make_exemplars)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CorruptStore, match=r"damaged.*profile again"), open_store(url) as opened:
        opened.exemplars.list()


def test_overwritten_pages_are_called_damaged(tmp_path: Path, make_exemplars: Callable[..., list[Exemplar]]) -> None:
    file = tmp_path / "store.db"
    url = filled(file, make_exemplars)
    content = file.read_bytes()
    file.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    with pytest.raises(CorruptStore), open_store(url) as opened:
        opened.exemplars.list()


def test_a_lost_table_is_called_damage(store: Store, run_sql: Callable[[str], None]) -> None:
    run_sql("DROP TABLE decisions")
    with pytest.raises(CorruptStore, match="decisions"):
        store.decisions.list()


def test_a_writer_that_waits_too_long_is_told_the_store_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.connection, "LOCK_SECONDS", 0.05)
    file = tmp_path / "store.db"
    with open_store(f"sqlite:///{file}") as opened:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Busy, match="Another process has been writing"):
            opened.tasks.put(TaskRecord("sql"))
        assert opened.tasks.list() == []  # readers do not wait
        other.execute("ROLLBACK")
        other.close()
        opened.tasks.put(TaskRecord("sql"))
        assert opened.tasks.list() == [TaskRecord("sql")]


def test_a_store_outlives_the_loss_of_its_connections(
    postgres_url: str, run_sql_on: Callable[[str, str], None]
) -> None:
    with open_store(postgres_url) as opened:
        opened.tasks.put(TaskRecord("sql"))
        run_sql_on(postgres_url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        assert opened.tasks.list() == [TaskRecord("sql")]


def test_references_are_held_by_the_database_itself(store: Store, database_url: str) -> None:
    database = Database(database_url)
    orphan = "INSERT INTO exemplars (task, embedder, position, text, vector, digest) VALUES ('gone', '', 0, '', '', '')"
    with pytest.raises(Conflict, match="contradicts others"), database.write() as session:
        session.execute(text(orphan))
    database.close()
    assert store.exemplars.list() == []


def test_a_block_that_raises_leaves_nothing(store: Store, database_url: str) -> None:
    database = Database(database_url)

    def write_and_fail() -> None:
        with database.write() as session:
            session.execute(
                text("INSERT INTO tasks (name, description, created) VALUES ('a', '', '2025-01-01 00:00:00')")
            )
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()
    database.close()
    assert store.tasks.list() == []


def test_our_own_bugs_are_not_dressed_up(store: Store, database_url: str) -> None:
    database = Database(database_url)
    with pytest.raises(Exception, match="syntax error") as caught, database.read() as session:
        session.execute(text("SELEKT"))
    database.close()
    assert not isinstance(caught.value, InvalidInput | Conflict | StoreUnreachable)


def test_a_new_embedded_store_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPAGER_HOME", str(tmp_path / "home"))
    with open_store() as opened:
        opened.tasks.put(TaskRecord("sql"))
        rights = {one.name: one.stat().st_mode & 0o777 for one in (tmp_path / "home").iterdir()}
    assert rights == {"store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600}
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700
