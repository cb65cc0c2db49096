"""A store into a file and back, on real databases: by the functions, and by the scripts of deploy/."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from store.backup import back_up, restore
from store.database import Store, open_store
from store.errors import Busy, Conflict, CorruptStore, NotFound
from store.records import Exemplar, TaskRecord

DEPLOY = Path(__file__).parents[2] / "deploy"
# In the place of docker: `compose ... exec -T postgres WORDS` runs WORDS here, everything else is noted.
DOCKER = """#!/bin/sh
while [ $# -gt 0 ] && [ "$1" != exec ]; do words="$words $1"; shift; done
[ $# -eq 0 ] && { echo "$words" >> "$NOTES"; exit 0; }
shift 3
exec "$@"
"""


@pytest.fixture(autouse=True)
def clients(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL's own, of the server's version, where a test has a server."""
    if "postgres_url" in request.fixturenames or "postgresql" in request.node.name:
        binaries = request.getfixturevalue("postgres_server").binaries
        monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")


def fill(store: Store, exemplars: list[Exemplar]) -> None:
    store.tasks.put(TaskRecord("sql"))
    store.exemplars.replace("sql", exemplars)


def compare(store: Store, exemplars: list[Exemplar]) -> None:
    store.check()
    assert [task.name for task in store.tasks.list()] == ["sql"]
    assert [one.vector.tobytes() for one in store.exemplars.list()] == [one.vector.tobytes() for one in exemplars]


def test_a_store_is_restored_as_it_was_while_it_was_open(
    tmp_path: Path, database_url: str, make_exemplars: Callable[..., list[Exemplar]]
) -> None:
    file, exemplars = tmp_path / "backup", make_exemplars("sql", 20)
    with open_store(database_url) as opened:
        fill(opened, exemplars)
        back_up(database_url, file)
        opened.tasks.put(TaskRecord("later"))
    assert file.stat().st_mode & 0o777 == 0o600
    restore(database_url, file, replace=True)
    with open_store(database_url) as opened:
        compare(opened, exemplars)
        opened.exemplars.replace("sql", make_exemplars("sql", 3))  # numbers of rows go on where they were
    assert sorted(one.name for one in tmp_path.iterdir() if not one.name.startswith("store.db")) == ["backup"]


def test_a_store_that_is_there_stays_unless_it_may_go(tmp_path: Path, database_url: str) -> None:
    file = tmp_path / "backup"
    with open_store(database_url) as opened:
        opened.tasks.put(TaskRecord("sql"))
    back_up(database_url, file)
    with pytest.raises(Conflict, match="--replace"):
        restore(database_url, file)
    with pytest.raises(Conflict, match="no backup is overwritten"):
        back_up(database_url, file)


def test_what_is_no_backup_leaves_the_store_as_it_was(tmp_path: Path, database_url: str) -> None:
    with open_store(database_url) as opened:
        opened.tasks.put(TaskRecord("sql"))
    back_up(database_url, tmp_path / "backup")
    (tmp_path / "half").write_bytes((tmp_path / "backup").read_bytes()[:-5000])
    (tmp_path / "text").write_text("dear diary " * 1000)
    for name in ("half", "text"):
        with pytest.raises(CorruptStore):
            restore(database_url, tmp_path / name, replace=True)
    with pytest.raises(NotFound, match="no backup"):
        restore(database_url, tmp_path / "none", replace=True)
    with open_store(database_url) as opened:
        opened.check()
        assert [task.name for task in opened.tasks.list()] == ["sql"]


def test_tables_of_a_newer_store_do_not_outlive_the_restore(
    tmp_path: Path, database_url: str, run_sql: Callable[[str], None]
) -> None:
    open_store(database_url).close()
    back_up(database_url, tmp_path / "backup")
    run_sql("CREATE TABLE of_tomorrow (id INTEGER)")
    restore(database_url, tmp_path / "backup", replace=True)
    run_sql("CREATE TABLE of_tomorrow (id INTEGER)")  # as its migration would


def test_a_store_that_is_not_there_is_not_backed_up(tmp_path: Path, postgres_url: str) -> None:
    for url in (f"sqlite:///{tmp_path / 'none.db'}", postgres_url):
        with pytest.raises(NotFound, match="store"):
            back_up(url, tmp_path / "backup")
    assert list(tmp_path.iterdir()) == []


def test_an_embedded_store_in_use_is_not_replaced_and_a_damaged_one_is(tmp_path: Path) -> None:
    url, target = f"sqlite:///{tmp_path / 'store.db'}", tmp_path / "store.db"
    with open_store(url) as opened:
        opened.tasks.put(TaskRecord("sql"))
        back_up(url, tmp_path / "backup")
        with pytest.raises(Busy, match="Stop the service"):
            restore(url, tmp_path / "backup", replace=True)
        assert [task.name for task in opened.tasks.list()] == ["sql"]
    target.write_bytes(b"x" * 10_000)
    Path(f"{target}-wal").write_bytes(b"of another")
    restore(url, tmp_path / "backup", replace=True)
    with open_store(url) as opened:
        opened.check()


def test_a_missing_client_is_named_and_a_password_is_no_argument(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(postgres_url).close()
    words = tmp_path / "pg_dump"
    words.write_text(f'#!/bin/sh\necho "$@ $PGPASSWORD" > {tmp_path}/said\nexit 1\n')
    words.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(Exception, match="pg_dump failed"):
        back_up(postgres_url.replace("postgres@", "postgres:secret@"), tmp_path / "backup")
    assert (tmp_path / "said").read_text().count("secret") == 1
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NotFound, match="pg_dump is not here"):
        back_up(postgres_url, tmp_path / "backup")
    assert not (tmp_path / "backup").exists()


def test_the_scripts_back_the_compose_files_database_up_and_restore_it(
    tmp_path: Path, postgres_server: Any, postgres_url: str, make_exemplars: Callable[..., list[Exemplar]]
) -> None:
    exemplars, notes = make_exemplars("sql", 20), tmp_path / "notes"
    docker = tmp_path / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    server = postgres_url.removesuffix("/postgres")
    port = server.rpartition(":")[2]
    where = {"PGHOST": "127.0.0.1", "PGPORT": port, "NOTES": str(notes), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    admin = f"{server.replace('+psycopg', '')}/postgres"

    def run(script: str, file: str) -> subprocess.CompletedProcess[str]:
        words = [str(DEPLOY / script), str(tmp_path / file)]
        return subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **where})

    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute("CREATE ROLE moepager SUPERUSER LOGIN")
        connection.execute("CREATE DATABASE moepager OWNER moepager")
    try:
        with open_store(f"{server}/moepager") as opened:
            fill(opened, exemplars)
            assert (done := run("backup.sh", "backup")).returncode == 0, done.stderr
            opened.tasks.put(TaskRecord("later"))
        assert run("backup.sh", "backup").returncode == 2  # it is there
        (tmp_path / "half").write_bytes((tmp_path / "backup").read_bytes()[:-5000])
        assert run("restore.sh", "half").returncode != 0
        with open_store(f"{server}/moepager") as opened:  # as it was, and the service was not stopped
            assert len(opened.tasks.list()) == 2
        assert not notes.exists()
        assert (done := run("restore.sh", "backup")).returncode == 0, done.stderr
        assert [line.split()[-2:] for line in notes.read_text().splitlines()] == [
            ["moepager", "worker"], ["start", "moepager"]
        ]  # fmt: skip
        with open_store(f"{server}/moepager") as opened:
            compare(opened, exemplars)
    finally:
        with psycopg.connect(admin, autocommit=True) as connection:
            connection.execute("DROP DATABASE IF EXISTS moepager WITH (FORCE)")
            connection.execute("DROP DATABASE IF EXISTS moepager_restored WITH (FORCE)")
            connection.execute("DROP ROLE moepager")
