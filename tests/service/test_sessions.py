"""A conversation keeps its task until its queries drift: the rule by itself, and over HTTP with receipts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.engine import Engine
from engine.scheduler import Rules
from engine.worker import EngineWorker
from service.app import create_app
from service.callers import ANYBODY
from service.parts import Parts
from service.retrieval import Ranked, Retrieval, decide
from service.sessions import IDLE_SECONDS, PATIENCE, Sessions

EGG, ROWS, NEITHER = "how long do I boil an egg", "select rows from orders", "who won the cup final yesterday"
TASKS = ("cooking", "sql")
CALLER = ANYBODY.named("s")


def _found(**similarities: float) -> Retrieval:
    """What a query that is so near to each task finds, the threshold being a half."""
    return decide([Ranked(task, near) for task, near in sorted(similarities.items(), key=lambda one: -one[1])], 0.5)


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


def test_a_follow_up_that_is_near_to_nothing_stays_with_the_task_for_a_while(sessions: Sessions) -> None:
    sessions.decide(CALLER, _found(cooking=0.8, sql=0.1), TASKS)
    vague = _found(cooking=0.2, sql=0.3)
    for _ in range(PATIENCE):
        decided = sessions.decide(CALLER, vague, TASKS)
        assert (decided.task, decided.reason, decided.similarity) == ("cooking", "session", 0.2)
    assert sessions.decide(CALLER, vague, TASKS) == vague
    assert sessions.decide(CALLER, vague, TASKS) == vague  # and it is forgotten


def test_a_query_of_the_task_makes_patience_new(sessions: Sessions) -> None:
    for _ in range(3):
        assert sessions.decide(CALLER, _found(cooking=0.8), TASKS).reason == "retrieved"
        for _ in range(PATIENCE):
            assert sessions.decide(CALLER, _found(cooking=0.2), TASKS).task == "cooking"


def test_a_clear_drift_moves_at_once_and_an_unclear_one_does_not(sessions: Sessions) -> None:
    sessions.decide(CALLER, _found(cooking=0.8), TASKS)
    both = _found(sql=0.7, cooking=0.6)
    assert sessions.decide(CALLER, both, TASKS).task == "cooking"
    assert sessions.decide(CALLER, _found(sql=0.7, cooking=0.4), TASKS).reason == "retrieved"
    assert sessions.decide(CALLER, both, TASKS).task == "sql"
    assert sessions.decide(CALLER, _found(cooking=0.7), TASKS).task == "cooking"  # the old one not even ranked


def test_a_task_that_was_named_is_kept_too(sessions: Sessions) -> None:
    sessions.note(CALLER, "sql")
    assert sessions.decide(CALLER, _found(sql=0.2), TASKS).task == "sql"
    assert sessions.decide(ANYBODY, _found(sql=0.2), TASKS).task is None


def test_a_task_that_is_gone_is_not_kept(sessions: Sessions) -> None:
    sessions.note(CALLER, "sql")
    assert sessions.decide(CALLER, _found(cooking=0.2), ("cooking",)).task is None


def test_a_conversation_that_begins_knows_nothing_of_another_that_began_so(sessions: Sessions) -> None:
    sessions.note(CALLER, "sql")
    assert sessions.decide(replace(CALLER, begins=True), _found(cooking=0.2), TASKS).task is None
    assert sessions.decide(CALLER, _found(cooking=0.2), TASKS).task is None


def test_what_runs_in_the_background_follows_and_changes_nothing(sessions: Sessions) -> None:
    title = replace(CALLER, priority="background")
    assert sessions.decide(title, _found(cooking=0.8), TASKS).task == "cooking"
    assert len(sessions) == 0
    sessions.note(CALLER, "sql")
    for _ in range(PATIENCE + 2):
        assert sessions.decide(title, _found(cooking=0.8, sql=0.1), TASKS).task == "sql"
    assert sessions.decide(CALLER, _found(sql=0.2), TASKS).task == "sql"


def test_memory_is_bounded_and_silence_ends_a_conversation() -> None:
    now = 0.0
    sessions = Sessions(most=2, clock=lambda: now)
    for name in "abc":
        sessions.note(ANYBODY.named(name), "sql")
    assert len(sessions) == 2
    assert sessions.decide(ANYBODY.named("a"), _found(sql=0.2), TASKS).task is None
    assert sessions.decide(ANYBODY.named("c"), _found(sql=0.2), TASKS).task == "sql"
    now = IDLE_SECONDS + 1
    assert sessions.decide(ANYBODY.named("c"), _found(sql=0.2), TASKS).task is None


@pytest.fixture
def own_client(parts: Parts) -> Iterator[TestClient]:
    """The real parts with a worker and a memory of their own; a background request waits for a tenth of a second."""
    with (
        EngineWorker(parts.engine, rules=Rules(background_seconds=0.1)) as worker,
        TestClient(create_app(lambda: nullcontext(replace(parts, worker=worker, sessions=Sessions())))) as client,
    ):
        while client.get("/readyz").status_code == 503:
            time.sleep(0.005)
        worker.run(Engine.evict).result(10)
        yield client


def _receipt(client: TestClient, text: str, *before: str, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": one} for one in (*before, text)]
    body = {"model": "tiny", "max_tokens": 2, "messages": turns, **fields}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    receipt: dict[str, Any] = answer.json()["usage"]["expert"]
    return receipt


def test_a_chat_keeps_its_task_and_the_receipt_says_so(own_client: TestClient) -> None:
    assert _receipt(own_client, EGG)["reason"] == "retrieved"
    kept = _receipt(own_client, NEITHER, EGG)
    assert (kept["task"], kept["reason"], kept["mode"]) == ("cooking", "session", "mask")
    drifted = _receipt(own_client, ROWS, EGG, NEITHER)
    assert (drifted["task"], drifted["reason"]) == ("sql", "retrieved")
    assert _receipt(own_client, NEITHER)["reason"] == "below-threshold"  # another conversation


def test_sessions_are_named_in_a_query_and_in_a_header(own_client: TestClient) -> None:
    def ask(text: str, headers: dict[str, str], **fields: str) -> tuple[str, str]:
        answer = own_client.post("/v1/query", json={"query": text, "max_tokens": 1, **fields}, headers=headers).json()
        return answer["receipt"]["task"], answer["receipt"]["reason"]

    assert ask(EGG, {}, session="a") == ("cooking", "retrieved")
    assert ask(ROWS, {"x-openwebui-chat-id": "b"}) == ("sql", "retrieved")
    assert ask(NEITHER, {}, session="a") == ("cooking", "session")
    assert ask(NEITHER, {"x-openwebui-chat-id": "b"}) == ("sql", "session")
    assert ask(NEITHER, {"x-openwebui-chat-id": "b"}, session="a") == ("cooking", "session")


def test_a_title_in_the_background_is_served_from_what_its_chat_left_and_never_swaps(own_client: TestClient) -> None:
    title = f"### Task:\nWrite a title.\n<chat_history>\nUSER: {EGG}\nASSISTANT: Seven minutes.\n</chat_history>"
    refused = own_client.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": title}]}
    )
    assert refused.status_code == 503, refused.text
    assert refused.headers["retry-after"] == "1"
    assert "cause no swap" in refused.json()["error"]["message"]
    front = _receipt(own_client, EGG)
    assert (front["priority"], front["experts_paged"] > 0) == ("normal", True)
    assert front["predicted_bytes"] == front["bytes_paged"] > 0
    assert front["predicted_swap_ms"] > 0
    behind = _receipt(own_client, title)
    assert (behind["priority"], behind["task"], behind["experts_paged"]) == ("background", "cooking", 0)
    assert behind["predicted_bytes"] == 0


def test_the_first_event_of_a_stream_says_what_the_swap_will_cost(own_client: TestClient, events_of: Any) -> None:
    answer = own_client.post("/v1/query", json={"query": EGG, "max_tokens": 1, "stream": True})
    events = dict(events_of(answer.text))
    assert events["task"]["predicted_bytes"] == events["done"]["receipt"]["bytes_paged"] > 0
    assert events["task"]["predicted_swap_ms"] == events["done"]["receipt"]["predicted_swap_ms"]
