from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from store.database import open_store
from store.records import Profile, TaskRecord


def test_without_a_url_the_store_is_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPAGER_HOME", str(tmp_path / "home"))
    with open_store() as opened:
        opened.tasks.put(TaskRecord("sql"))
    assert (tmp_path / "home" / "store.db").is_file()
    with open_store() as again:
        assert again.tasks.list() == [TaskRecord("sql")]


def test_what_is_stored_is_there_when_the_store_is_opened_again(
    database_url: str, make_profile: Callable[..., Profile], model: object
) -> None:
    with open_store(database_url) as opened:
        opened.models.put(model)  # type: ignore[arg-type]
        opened.tasks.put(TaskRecord("sql"))
        opened.profiles.put(make_profile())
    with open_store(database_url) as again:
        assert again.profiles.list() == [make_profile()]


def test_a_closed_sqlite_store_is_one_file(tmp_path: Path) -> None:
    with open_store(f"sqlite:///{tmp_path / 'store.db'}") as opened:
        opened.tasks.put(TaskRecord("sql"))
    assert [file.name for file in tmp_path.iterdir()] == ["store.db"]


def test_threads_that_open_a_fresh_store_at_once_make_it_once(database_url: str) -> None:
    def put(number: int) -> None:
        with open_store(database_url) as opened:
            opened.tasks.put(TaskRecord(f"t{number}"))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(put, range(6)))
    with open_store(database_url) as opened:
        assert [task.name for task in opened.tasks.list()] == [f"t{n}" for n in range(6)]


def test_a_store_that_is_up_to_date_opens_at_once(database_url: str) -> None:
    open_store(database_url).close()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        open_store(database_url).close()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.15
