from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from sqlalchemy import text

from store.connection import Database
from store.database import Store, open_store
from store.errors import CorruptStore
from store.records import Exemplar, Profile, Selection, StoredSelection, TaskRecord


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


def test_many_that_turn_a_fresh_file_into_a_store_at_once_wait_for_each_other(tmp_path: Path) -> None:
    """SQLite refuses some of them at once: 2 in a hundred, so 40 files of 8 show it."""

    def turn(place: tuple[Path, Barrier]) -> None:
        path, together = place
        database = Database(f"sqlite:///{path}")
        together.wait()
        with database.read() as session:
            assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        database.close()

    with ThreadPoolExecutor(8) as pool:
        for number in range(40):
            list(pool.map(turn, [(tmp_path / f"{number}.db", Barrier(8))] * 8))


@pytest.fixture
def full(stocked: Store, make_profile: Callable[..., Profile], make_exemplars: Callable[..., list[Exemplar]]) -> Store:
    stocked.exemplars.replace("sql", make_exemplars("sql", 3))
    selection = StoredSelection("s1", "p1", "gate", "uniform", 0.5, Selection.whole(2, 4))
    stocked.profiles.put(make_profile(), [selection])
    return stocked


def test_a_sound_store_passes_its_check(full: Store) -> None:
    full.check()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("UPDATE exemplars SET text = 'changed' WHERE position = 1", "Exemplar 'changed' of task 'sql' is damaged"),
        ("UPDATE profiles SET statistics = substr(statistics, 1, 50)", "statistics of profile p1 are damaged"),
        ("UPDATE selections SET bitmap = substr(bitmap, 1, 1)", "selection s1 is damaged"),
    ],
)
def test_a_check_finds_damage_in_every_table(
    full: Store, run_sql: Callable[[str], None], damage: str, said: str
) -> None:
    run_sql(damage)
    with pytest.raises(CorruptStore, match=said):
        full.check()


def test_a_check_looks_at_pages_that_no_query_reads(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    with open_store(f"sqlite:///{file}") as opened:
        for number in range(200):
            opened.tasks.put(TaskRecord(f"t{number}", "x" * 200))
    content = bytearray(file.read_bytes())
    content[-4096:] = b"\xff" * 4096
    file.write_bytes(content)
    with pytest.raises(CorruptStore, match="damaged"), open_store(f"sqlite:///{file}") as opened:
        opened.check()


def test_a_store_that_is_up_to_date_opens_at_once(database_url: str) -> None:
    open_store(database_url).close()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        open_store(database_url).close()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.15
