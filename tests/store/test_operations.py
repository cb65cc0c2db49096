"""What a running service reads and writes: the count of changes, keys, the text of tasks, and jobs that two want."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from store.database import open_store
from store.errors import Conflict, InvalidInput, NotFound
from store.records import ApiKey, Job, MadeBy, StoredCorpus, TaskRecord

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
        claimed = store.jobs.claim("j")
        assert store.jobs.claim("j") is None
        found = store.jobs.get("j")
        assert claimed == found
        assert (found.state, found.detail, found.attempt) == ("running", "starting", 1)
        assert found.updated > NOW
        assert not store.jobs.change("unknown", ["queued"], progress=0.5)
        with pytest.raises(InvalidInput):
            store.jobs.change("j", ["running"], progress=2.0)


def test_a_runner_that_was_thought_dead_can_note_nothing_any_more(database_url: str) -> None:
    with open_store(database_url) as store:
        store.jobs.put(Job("j", "m", "sql", "queued", 0.0, "", NOW, NOW))
        assert store.jobs.claim("j") is not None
        store.jobs.revive("m", timedelta(hours=1), 3)
        assert store.jobs.get("j").state == "running"
        store.jobs.revive("m", timedelta(seconds=-1), 3)
        assert (store.jobs.get("j").state, store.jobs.get("j").deaths) == ("queued", 1)
        assert store.jobs.claim("j") is not None
        for change in ({"progress": 0.5}, {"state": "done"}, {"state": "queued"}):
            assert not store.jobs.change("j", ["running"], attempt=1, **change)
        assert store.jobs.change("j", ["running"], attempt=2, progress=0.25)
        assert (store.jobs.get("j").state, store.jobs.get("j").progress) == ("running", 0.25)


def test_a_job_over_which_its_runners_die_is_given_up(database_url: str) -> None:
    with open_store(database_url) as store:
        store.jobs.put(Job("j", "m", "sql", "queued", 0.0, "", NOW, NOW))
        for _ in range(2):
            assert store.jobs.claim("j") is not None
            store.jobs.revive("m", timedelta(seconds=-1), 2)
        assert store.jobs.get("j").state == "failed"
        assert "died 2 times over this job" in store.jobs.get("j").detail


def test_a_task_of_a_model_has_one_job_at_a_time_that_has_not_ended(database_url: str) -> None:
    with open_store(database_url) as store:
        store.jobs.put(Job("a", "m", "sql", "running", 0.0, "", NOW, NOW))
        with pytest.raises(Conflict):
            store.jobs.put(Job("b", "m", "sql", "queued", 0.0, "", NOW, NOW))
        store.jobs.put(Job("c", "another", "sql", "queued", 0.0, "", NOW, NOW))
        store.jobs.put(Job("d", "m", "sql", "done", 0.0, "", NOW, NOW))
        store.jobs.update("a", state="failed")
        store.jobs.put(Job("b", "m", "sql", "queued", 0.0, "", NOW, NOW))


def test_a_task_is_noted_with_the_request_that_made_it(database_url: str) -> None:
    request = MadeBy("k" * 64, "b" * 64)
    with open_store(database_url) as store:
        store.corpora.create(TaskRecord("sql"), CORPUS, NOW, request=request)
        assert store.corpora.made_by(request.key) == request
        assert store.corpora.made_by("other") is None
        with pytest.raises(Conflict, match="Idempotency-Key"):
            store.corpora.create(TaskRecord("b"), replace(CORPUS, task="b"), NOW, request=request)
        assert [task.name for task in store.tasks.list()] == ["sql"]
