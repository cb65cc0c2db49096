"""A conversation keeps its task until its queries drift: the rule by itself, and over HTTP with receipts."""

from __future__ import annotations

import json
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
from service.callers import ANYBODY, Caller
from service.parts import Parts, open_parts
from service.passages import Passage, Turn
from service.retrieval import Ranked, Retrieval, decide
from service.sessions import IDLE_SECONDS, PATIENCE, Sessions
from service.settings import Settings

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


def _chat(*texts: str) -> Caller:
    """Who says these, every other text being our answer to the one before."""
    turns = [Turn(role, text) for role, text in zip(["user", "assistant"] * len(texts), texts, strict=False)]
    return replace(ANYBODY, passage=Passage.of("", turns))


def test_chats_that_begin_alike_go_on_each_with_its_own_task(sessions: Sessions) -> None:
    for task, answer in (("sql", "SELECT 1;"), ("cooking", "Seven minutes.")):
        caller = _chat("hi")
        sessions.note(caller, task)
        sessions.answered(caller, {"content": answer})
    assert sessions.decide(_chat("hi", "SELECT 1;", "shorter"), _found(cooking=0.2), TASKS).task == "sql"
    assert sessions.decide(_chat("hi", "Seven minutes.", "shorter"), _found(sql=0.2), TASKS).task == "cooking"
    assert sessions.decide(_chat("hi"), _found(sql=0.2), TASKS).task is None
    assert sessions.decide(_chat("hi", "Yes?", "shorter"), _found(sql=0.2), TASKS).task is None


def test_patience_is_a_conversations_own_however_often_a_turn_is_sent_again(sessions: Sessions) -> None:
    said = ["boil an egg"]
    sessions.note(first := _chat(*said), "cooking")
    sessions.answered(first, {"content": "a"})
    for _ in range(PATIENCE):
        said += ["a", "shorter"]
        for _ in range(3):  # a client that tries again, or asks for another answer
            caller = _chat(*said)
            assert sessions.decide(caller, _found(sql=0.2), TASKS).task == "cooking"
            sessions.answered(caller, {"content": "a"})
    said += ["a", "shorter"]
    last = _chat(*said)
    assert sessions.decide(last, _found(sql=0.2), TASKS).task is None
    sessions.answered(last, {"content": "a"})
    assert sessions.decide(_chat(*said, "a", "shorter"), _found(sql=0.2), TASKS).task is None  # and it is forgotten


def test_an_answer_that_was_edited_is_passed_over_for_the_one_before(sessions: Sessions) -> None:
    sessions.note(first := _chat("boil an egg"), "cooking")
    sessions.answered(first, {"content": "Seven minutes."})
    edited = _chat("boil an egg", "Seven minutes.", "and rice", "something else", "shorter")
    assert sessions.decide(edited, _found(sql=0.2), TASKS).task == "cooking"


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


def _receipt(client: TestClient, text: str, **fields: Any) -> dict[str, Any]:
    return _said(client, [{"role": "user", "content": text}], **fields)[0]


def _said(client: TestClient, messages: list[dict[str, Any]], **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The receipt, and the message that a client would keep."""
    body = {"model": "tiny", "max_tokens": 2, "messages": messages, **fields}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not fields.get("stream"):
        return answer.json()["usage"]["expert"], answer.json()["choices"][0]["message"]
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    pieces = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    [receipt] = [chunk["expert"] for chunk in chunks if "expert" in chunk]
    return receipt, {"role": "assistant", "content": "".join(pieces)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_keeps_its_task_and_the_receipt_says_so(own_client: TestClient, stream: bool) -> None:
    messages: list[dict[str, Any]] = []

    def say(text: str) -> tuple[str | None, str]:
        messages.append({"role": "user", "content": text})
        receipt, answer = _said(own_client, messages, stream=stream)
        messages.append(answer)
        return receipt["task"], receipt["reason"]

    assert say(EGG) == ("cooking", "retrieved")
    assert say(NEITHER) == ("cooking", "session")
    assert say(ROWS) == ("sql", "retrieved")
    assert _receipt(own_client, NEITHER)["reason"] == "below-threshold"  # another conversation


def test_two_chats_behind_one_key_that_begin_alike_keep_their_own_tasks(own_client: TestClient) -> None:
    chats = {}
    for task in TASKS:
        chats[task] = [{"role": "user", "content": "hello"}]
        chats[task].append(_said(own_client, chats[task], model=f"tiny:{task}")[1])
    for task, messages in chats.items():
        receipt, _ = _said(own_client, [*messages, {"role": "user", "content": NEITHER}])
        assert (receipt["task"], receipt["reason"]) == (task, "session")


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
    title = "### Task:\nWrite a title.\n<chat_history>\nUSER: {}\nASSISTANT: {}\n</chat_history>"
    about = title.format(EGG, "Seven minutes.")
    refused = own_client.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": about}]}
    )
    assert refused.status_code == 503, refused.text
    assert refused.headers["retry-after"] == "1"
    assert "cause no swap" in refused.json()["error"]["message"]
    front, answer = _said(own_client, [{"role": "user", "content": EGG}])
    assert (front["priority"], front["experts_paged"] > 0) == ("normal", True)
    assert front["predicted_bytes"] == front["bytes_paged"] > 0
    assert front["predicted_swap_ms"] > 0
    behind = _receipt(own_client, title.format(EGG, answer["content"]))
    assert (behind["priority"], behind["task"], behind["experts_paged"]) == ("background", "cooking", 0)
    assert behind["predicted_bytes"] == 0


def test_the_first_event_of_a_stream_says_what_the_swap_will_cost(own_client: TestClient, events_of: Any) -> None:
    answer = own_client.post("/v1/query", json={"query": EGG, "max_tokens": 1, "stream": True})
    events = dict(events_of(answer.text))
    assert events["task"]["predicted_bytes"] == events["done"]["receipt"]["bytes_paged"] > 0
    assert events["task"]["predicted_swap_ms"] == events["done"]["receipt"]["predicted_swap_ms"]


def test_a_background_request_hears_of_its_experts_before_its_time_is_over(half_settings: Settings) -> None:
    """Where a request's time is shorter than the wait for experts."""
    settings = half_settings.model_copy(update={"request_timeout": 1.0})
    assert (settings.background_wait, half_settings.background_seconds) == (30.0, 30.0)
    with open_parts(settings) as parts, TestClient(create_app(lambda: nullcontext(parts))) as client:
        while client.get("/readyz").status_code == 503:
            time.sleep(0.005)
        body = {"model": "tiny:sql", "messages": [{"role": "user", "content": ROWS}], "max_tokens": 2}
        answer = client.post("/v1/chat/completions", json={**body, "expert": {"priority": "background"}})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "busy")
    assert answer.headers["x-should-retry"] == "true"
