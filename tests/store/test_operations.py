"""What a running service reads and writes: the count of changes, keys, the text of tasks, and jobs that two want."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from store.database import open_store
from store.errors import Conflict, InvalidInput, NotFound
from store.records import ApiKey, Job, StoredCorpus, TaskRecord

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CORPUS = StoredCorpus("sql", ("select",), ({"prompt": "a", "response": "b"},), ({"prompt": "c"},))


def test_the_count_rises_with_every_change_that_a_service_must_see(database_url: str) -> None:
    key = ApiKey("k1", "laptop", "query", "0" * 64, None, NOW)
    with open_store(database_url) as store:
        changes: list[Callable[[], None]] = [
            lambda: store.tasks.put(TaskRecord("sql")),
            lambda: store.exemplars.replace("sql", []),
            lambda: store.keys.put(key),
            lambda: store.keys.delete("k1"),
            lambda: store.tasks.delete("sql"),
        ]
        for change in changes:
            before = store.changes.count()
            change()
            assert store.changes.count() == before + 1


def test_a_change_that_fails_is_not_counted(database_url: str) -> None:
    with open_store(database_url) as store:
        before = store.changes.count()
        with pytest.raises(NotFound):
            store.tasks.delete("nobody")
        assert store.changes.count() == before


def test_keys_come_back_as_they_were_put_and_go_once(database_url: str) -> None:
    keys = [
        ApiKey("a", "x", "operator", "1" * 64, None, NOW),
        ApiKey("b", "x", "query", "2" * 64, 60, NOW, ("code", "sql")),
    ]
    with open_store(database_url) as store:
        for key in keys:
            store.keys.put(key)
        assert store.keys.list() == keys
        with pytest.raises(Conflict, match="Key a"):
            store.keys.put(keys[0])
        store.keys.delete("a")
        with pytest.raises(NotFound, match="'a'"):
            store.keys.delete("a")
        assert store.keys.list() == keys[1:]


def test_a_tasks_text_comes_and_goes_with_it(database_url: str) -> None:
    with open_store(database_url) as store:
        store.corpora.create(TaskRecord("sql", "tables"), CORPUS, NOW)
        assert (store.tasks.get("sql"), store.corpora.get("sql")) == (TaskRecord("sql", "tables"), CORPUS)
        with pytest.raises(Conflict, match="'sql'"):
            store.corpora.create(TaskRecord("sql"), CORPUS, NOW)
        store.tasks.delete("sql")
        with pytest.raises(NotFound):
            store.corpora.get("sql")
        store.tasks.put(TaskRecord("sql"))
        with pytest.raises(NotFound, match="from a file"):
            store.corpora.get("sql")


def test_a_text_with_a_bad_name_stores_nothing(database_url: str) -> None:
    with open_store(database_url) as store:
        with pytest.raises(InvalidInput):
            store.corpora.create(TaskRecord(" "), StoredCorpus(" ", (), (), ()), NOW)
        assert store.tasks.list() == []


def test_of_two_that_want_a_job_one_gets_it(database_url: str) -> None:
    with open_store(database_url) as store:
        store.jobs.put(Job("j", "m", "sql", "queued", 0.0, "", NOW, NOW))
        assert store.jobs.change("j", ["queued"], state="running", detail="mine")
        assert not store.jobs.change("j", ["queued"], state="running", detail="no, mine")
        found = store.jobs.get("j")
        assert (found.state, found.detail) == ("running", "mine")
        assert found.updated > NOW
        assert not store.jobs.change("unknown", ["queued"], progress=0.5)
        with pytest.raises(InvalidInput):
            store.jobs.change("j", ["running"], progress=2.0)
