"""The very commands of docs/operations.md that back a store up and restore it, run on real databases."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from store.database import Store, open_store
from store.records import Exemplar, TaskRecord

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def command(begin: str) -> str:
    [line] = [line for line in PAGE.read_text().splitlines() if line.startswith(begin)]
    return line.split("   #")[0]


def run(words: str, folder: Path, **variables: str) -> None:
    done = subprocess.run(
        ["bash", "-ec", words], cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr


def compare(store: Store, tasks: list[str], exemplars: list[Exemplar]) -> None:
    store.check()
    assert [task.name for task in store.tasks.list()] == tasks
    assert [one.vector.tobytes() for one in store.exemplars.list()] == [one.vector.tobytes() for one in exemplars]


def test_an_embedded_store_is_restored_as_it_was(tmp_path: Path, make_exemplars: Callable[..., list[Exemplar]]) -> None:
    url, exemplars = f"sqlite:///{tmp_path / 'store.db'}", make_exemplars("sql", 20)
    with open_store(url) as opened:
        opened.tasks.put(TaskRecord("sql"))
        opened.exemplars.replace("sql", exemplars)
        run(command("python3 -c"), tmp_path)  # while it is open
        opened.tasks.put(TaskRecord("later"))
    restore = command("systemctl stop moepager &&")
    run(restore, tmp_path, **{"BASH_FUNC_systemctl%%": "() { :; }"})
    with open_store(url) as opened:
        compare(opened, ["sql"], exemplars)


def test_a_store_on_a_server_is_restored_as_it_was(
    tmp_path: Path, postgres_server: Any, postgres_url: str, make_exemplars: Callable[..., list[Exemplar]]
) -> None:
    exemplars, port = make_exemplars("sql", 20), str(make_url(postgres_url).port)
    where = {"PGHOST": "127.0.0.1", "PGPORT": port, "PGUSER": "postgres"}
    where["PATH"] = f"{postgres_server.binaries}:{os.environ['PATH']}"  # a dump wants the server's own version
    with open_store(postgres_url) as opened:
        opened.tasks.put(TaskRecord("sql"))
        opened.exemplars.replace("sql", exemplars)
        run(command("pg_dump").replace(" moepager", " postgres"), tmp_path, **where)
        opened.tasks.put(TaskRecord("later"))
    run(command("pg_restore").replace("=moepager", "=postgres"), tmp_path, **where)
    with open_store(postgres_url) as opened:
        compare(opened, ["sql"], exemplars)
        opened.exemplars.replace("sql", make_exemplars("sql", 3))  # numbers of rows go on where they were
