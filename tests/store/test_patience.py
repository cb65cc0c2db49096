"""A PostgreSQL that hangs: whoever waits is let go, the others are not kept, and it is used again once it answers."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
from sqlalchemy import text

import store.connection
from store.database import open_store
from store.errors import NotFound, StoreUnreachable
from store.patience import Breaker, PatientConnection
from store.records import TaskRecord


def test_after_one_that_waited_in_vain_others_are_refused_until_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    breaker = Breaker()
    with breaker.passing() as began:
        pass
    now[0] += 8
    breaker.trip("silent", now[0])
    with pytest.raises(StoreUnreachable, match="silent"), breaker.passing():
        raise AssertionError
    now[0] += 1.5
    with breaker.passing(), pytest.raises(StoreUnreachable), breaker.passing():  # one at a time tries
        raise AssertionError
    with breaker.passing(), breaker.passing():  # it answered: all may
        pass
    breaker.trip("late", began)  # of one that began before it answered again
    with breaker.passing():
        pass


def test_an_error_of_the_caller_is_no_silence() -> None:
    breaker = Breaker()
    with pytest.raises(NotFound), breaker.passing():
        raise NotFound("no row")
    with breaker.passing():
        pass


def test_a_frozen_server_lets_its_callers_go_and_is_used_again(
    mortal_postgres: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientConnection, "patience", 0.3)
    monkeypatch.setattr(store.connection, "CONNECT_SECONDS", 2)
    with open_store(mortal_postgres.empty()) as opened:
        opened.tasks.put(TaskRecord("sql"))
        mortal_postgres.signal(signal.SIGSTOP)
        try:
            with pytest.raises(StoreUnreachable, match="Check that the server runs"):
                opened.tasks.list()
            before = time.process_time()
            for _ in range(5):
                with pytest.raises(StoreUnreachable):
                    opened.tasks.list()
            assert time.process_time() - before < 1
        finally:
            mortal_postgres.signal(signal.SIGCONT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                assert opened.tasks.list() == [TaskRecord("sql")]
                break
            except StoreUnreachable:
                time.sleep(0.05)
        else:
            pytest.fail("it answers, and is not used")


def test_a_server_killed_in_the_middle_of_a_write_kept_all_or_nothing(mortal_postgres: Any) -> None:
    url = mortal_postgres.empty()
    with open_store(url) as opened:
        opened.tasks.put(TaskRecord("sql"))

        def write() -> None:
            with opened._database.write() as session:
                session.execute(_insert("half"))
                mortal_postgres.kill()
                session.execute(_insert("whole"))

        with pytest.raises(StoreUnreachable):
            write()
        with pytest.raises(StoreUnreachable):
            opened.tasks.list()
        mortal_postgres.start()
        assert opened.tasks.list() == [TaskRecord("sql")]


def _insert(name: str) -> Any:
    return text(
        f"INSERT INTO tasks (name, description, created) VALUES ('{name}', '', now())"  # noqa: S608
    )
