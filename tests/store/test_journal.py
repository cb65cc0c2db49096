from __future__ import annotations

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from store.database import Store, open_store
from store.errors import Busy, Conflict, CorruptStore, InvalidInput, NotFound
from store.records import Decision, Job, JobTally, TaskRecord

START = datetime(2025, 3, 1, tzinfo=UTC)
STATES = ("queued", "running", "done", "failed", "cancelled")


def job(id: str = "j1", **changes: Any) -> Job:  # noqa: A002
    fields = {"model": "m", "task": "sql", "state": "queued", "progress": 0.0, "detail": "", "created": START}
    return Job(id=id, **{**fields, "updated": START, **changes})


def decision(number: int = 1, **changes: Any) -> Decision:
    fields: dict[str, Any] = {
        "request": f"r{number}",
        "query_hash": "q" * 64,
        "task": "sql",
        "nearest": "sql",
        "similarity": 0.75,
        "threshold": 0.5,
        "reason": "retrieved",
        "mode": "mask",
        "created": START,
    }
    return Decision(**{**fields, **changes})


def test_a_job_comes_back_as_it_was(store: Store) -> None:
    store.jobs.put(job(progress=0.25, detail="25 of 100 items", options={"scorers": ["peu"], "search": True}))
    assert store.jobs.get("j1") == job(
        progress=0.25, detail="25 of 100 items", options={"scorers": ["peu"], "search": True}
    )


def test_an_update_changes_what_is_given_and_notes_the_time(store: Store) -> None:
    store.jobs.put(job(detail="waiting"))
    running = store.jobs.update("j1", state="running", progress=0.5)
    assert (running.state, running.progress, running.detail) == ("running", 0.5, "waiting")
    assert running.updated > START
    assert running.created == START
    done = store.jobs.update("j1", state="done", progress=1.0, detail="")
    assert store.jobs.get("j1") == done
    assert (done.state, done.detail) == ("done", "")


def test_jobs_are_listed_the_youngest_first(store: Store) -> None:
    for number in (1, 3, 2):
        store.jobs.put(job(f"j{number}", task=f"t{number}", created=START + timedelta(hours=number)))
    assert [found.id for found in store.jobs.list()] == ["j3", "j2", "j1"]


def test_jobs_are_listed_by_their_states(store: Store) -> None:
    for number, state in enumerate(("queued", "done", "running", "queued")):
        store.jobs.put(job(f"j{number}", task=f"t{number}", state=state, created=START + timedelta(hours=number)))
    assert [found.id for found in store.jobs.list(("queued", "running"))] == ["j3", "j2", "j0"]
    assert store.jobs.list(("failed",)) == []


def test_jobs_of_a_model_are_counted_by_state_and_the_oldest_that_waits_is_timed(store: Store) -> None:
    assert store.jobs.tally("m") == JobTally(dict.fromkeys(STATES, 0), 0.0)
    ago = datetime.now(UTC) - timedelta(hours=1)
    store.jobs.put(job("j1", task="a", state="done", created=ago - timedelta(hours=5)))
    store.jobs.put(job("j2", task="b", state="queued", created=ago + timedelta(minutes=20)))
    store.jobs.put(job("j3", task="c", state="running", created=ago))
    store.jobs.put(job("j4", model="other", state="queued", created=ago - timedelta(hours=9)))
    found = store.jobs.tally("m")
    assert found.counts == {"queued": 1, "running": 1, "done": 1, "failed": 0, "cancelled": 0}
    assert 3600 <= found.oldest_seconds < 3660


def test_an_id_that_is_taken_is_refused(store: Store) -> None:
    store.jobs.put(job())
    with pytest.raises(Conflict, match="j1 is in the store already"):
        store.jobs.put(job(detail="another"))
    assert store.jobs.get("j1").detail == ""


def test_an_unknown_job_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match="No job j9"):
        store.jobs.get("j9")
    with pytest.raises(NotFound, match="No job j9"):
        store.jobs.update("j9", state="done")


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress_is_a_share(store: Store, progress: float) -> None:
    store.jobs.put(job())
    with pytest.raises(InvalidInput, match="between 0 and 1"):
        store.jobs.update("j1", progress=progress)
    with pytest.raises(InvalidInput, match="between 0 and 1"):
        store.jobs.put(job("j2", progress=progress))


def test_a_state_that_is_none_is_refused_by_the_database(store: Store) -> None:
    with pytest.raises(Conflict, match="state"):
        store.jobs.put(job(state="sleeping"))
    assert store.jobs.list() == []


def test_a_job_outlives_its_task(stocked: Store) -> None:
    stocked.jobs.put(job())
    stocked.tasks.delete("sql")
    assert [found.task for found in stocked.jobs.list()] == ["sql"]


def test_decisions_come_back_the_youngest_first(store: Store) -> None:
    given = [decision(n, created=START + timedelta(seconds=n)) for n in range(5)]
    for each in given:
        store.decisions.add(each)
    assert store.decisions.list() == given[::-1]
    assert store.decisions.list(limit=2) == [given[4], given[3]]


def test_a_decision_for_no_task_comes_back(store: Store) -> None:
    given = decision(task=None, nearest=None, similarity=None, reason="no-tasks", mode="exact")
    store.decisions.add(given)
    assert store.decisions.list() == [given]


def test_a_limit_is_at_least_one(store: Store) -> None:
    with pytest.raises(InvalidInput, match="at least 1, got 0"):
        store.decisions.list(limit=0)


def test_threads_add_decisions_and_tasks_without_losing_any(store: Store) -> None:
    def work(number: int) -> None:
        store.decisions.add(decision(number))
        store.tasks.put(TaskRecord("same", str(number)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert {found.request for found in store.decisions.list()} == {f"r{n}" for n in range(40)}
    assert len(store.tasks.list()) == 1


def test_the_audit_log_survives_its_task(stocked: Store, run_sql: Callable[[str], None]) -> None:
    stocked.decisions.add(decision())
    stocked.tasks.delete("sql")
    assert stocked.decisions.list() == [decision()]


def test_decisions_are_read_by_task_since_a_time_and_page_by_page(store: Store) -> None:
    for n in range(6):
        task = "sql" if n % 2 else "cooking"
        store.decisions.add(decision(n, task=task, created=START + timedelta(days=n), key="k", model="m", keep=0.5))
    assert [one.request for one in store.decisions.list(task="sql")] == ["r5", "r3", "r1"]
    assert [one.request for one in store.decisions.list(since=START + timedelta(days=4))] == ["r5", "r4"]
    first = store.decisions.list(2)
    second = store.decisions.list(2, before=first[-1].id)
    assert [one.request for one in (*first, *second)] == ["r5", "r4", "r3", "r2"]
    assert (first[0].key, first[0].model, first[0].profile, first[0].keep) == ("k", "m", None, 0.5)


def test_old_decisions_are_forgotten_in_portions(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.journal.PORTION", 2)
    for n in range(6):
        store.decisions.add(decision(n, created=START + timedelta(days=n)))
    assert store.decisions.forget(START + timedelta(days=4)) == 4
    assert [one.request for one in store.decisions.list()] == ["r5", "r4"]
    assert store.decisions.forget(START) == 0


def test_a_decision_costs_sqlite_one_statement_and_is_kept_at_once(tmp_path: Path) -> None:
    said: list[str] = []
    with open_store(f"sqlite:///{tmp_path / 'store.db'}") as opened:
        opened.decisions.add(decision(0))
        with closing(opened.decisions._database._engine.raw_connection()) as held:
            held.driver_connection.set_trace_callback(said.append)  # type: ignore[union-attr]
        opened.decisions.add(decision(1))
        assert [one.split()[0] for one in said] == ["INSERT"]
        with closing(sqlite3.connect(tmp_path / "store.db")) as other:  # as one that comes after a kill sees it
            assert other.execute("SELECT request FROM decisions ORDER BY id").fetchall() == [("r0",), ("r1",)]


def test_a_decision_that_can_not_be_written_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("store.connection.LOCK_SECONDS", 0.05)
    file = tmp_path / "store.db"
    with open_store(f"sqlite:///{file}") as opened, closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Busy, match="Another process has been writing"):
            opened.decisions.add(decision(0))
        other.execute("ROLLBACK")
        with pytest.raises(InvalidInput, match="lone surrogate"):
            opened.decisions.add(decision(1, task="\ud800"))
        other.execute("DROP TABLE decisions")
        with pytest.raises(CorruptStore, match="decisions"):
            opened.decisions.add(decision(2))


def test_a_decision_of_a_time_zone_is_kept_in_utc(store: Store) -> None:
    given = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=5)))
    store.decisions.add(decision(created=given))
    assert [one.created for one in store.decisions.list()] == [given]
