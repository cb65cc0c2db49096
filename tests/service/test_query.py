"""`POST /v1/query` on a real engine: answers equal the engine's own, receipts say what was served, refusals say why."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.requests import FinishedEvent
from service.parts import Parts
from store.records import Selection

EGG = "how long do I boil an egg"
JSON = {"content-type": "application/json"}
CUP = "who won the cup final yesterday"

Generated = Callable[..., FinishedEvent]
Named = Callable[[str], Selection]


def chat_tokens(parts: Parts, text: str) -> tuple[int, ...]:
    return parts.engine.tokenizer.encode_chat([{"role": "user", "content": text}])


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/query", json={"max_tokens": 8, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refusal(client: TestClient, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = client.post("/v1/query", json=body)
    return answer.status_code, answer.json()["error"]


def test_a_query_is_answered_inside_its_tasks_selection(
    client: TestClient, parts: Parts, generated: Generated, selection_named: Named
) -> None:
    answer = ask(client, query=EGG)
    alone = generated(chat_tokens(parts, EGG), selection_named("cooking-reap-0.5"), max_tokens=8)
    assert (answer["task"], answer["answer"], answer["finish_reason"]) == ("cooking", alone.text, alone.reason)


def test_the_receipt_says_what_was_served(client: TestClient, parts: Parts, selection_named: Named) -> None:
    selection = selection_named("cooking-reap-0.5")
    ask(client, query="select rows from orders", task="sql", keep=0.25, scorer="tcess")
    receipt = ask(client, query=EGG)["receipt"]
    assert receipt["task"] == receipt["served_task"] == "cooking"
    assert (receipt["reason"], receipt["mode"], receipt["keep"], receipt["scorer"]) == (
        "retrieved",
        "mask",
        0.5,
        "reap",
    )
    assert (receipt["experts"], receipt["selection"]) == (len(selection), selection.digest)
    assert (receipt["model"], receipt["profile_id"], receipt["escalated"]) == ("tiny", "p-cooking", None)
    assert receipt["similarity"] > parts.retriever.threshold
    assert 0 < receipt["coverage"] <= 1
    assert receipt["bytes_paged"] == receipt["experts_paged"] * parts.engine.card.expert_bytes
    assert (receipt["prompt_tokens"], receipt["completion_tokens"]) == (len(chat_tokens(parts, EGG)), 8)
    assert receipt["ttft_ms"] > receipt["queue_ms"] >= 0


def test_a_doubted_profile_serves_and_the_receipt_says_the_doubt(client: TestClient, doubt: str) -> None:
    doubted = ask(client, query="select rows from orders", task="sql")["receipt"]
    assert (doubted["mode"], doubted["doubts"]) == ("mask", [doubt])
    assert ask(client, query=EGG)["receipt"]["doubts"] == []
    assert ask(client, query="select rows from orders", task="sql", mode="exact")["receipt"]["doubts"] == []


def test_what_is_resident_is_not_paged_again(client: TestClient) -> None:
    ask(client, query=EGG)
    receipt = ask(client, query=EGG)["receipt"]
    assert (receipt["experts_paged"], receipt["bytes_paged"]) == (0, 0)
    assert receipt["resident_bytes"] > 0


def test_a_swap_pages_exactly_what_is_missing(client: TestClient, parts: Parts) -> None:
    ask(client, query=EGG)
    before = parts.engine.residency()
    receipt = ask(client, query="select rows from orders")["receipt"]
    after = parts.engine.residency()
    assert receipt["task"] == "sql"
    assert receipt["experts_paged"] == after.experts_paged - before.experts_paged > 0
    assert receipt["bytes_paged"] == after.bytes_paged - before.bytes_paged


def test_a_query_of_no_task_is_served_exactly_and_says_so(
    client: TestClient, parts: Parts, generated: Generated
) -> None:
    answer = ask(client, query=CUP)
    receipt = answer["receipt"]
    assert answer["answer"] == generated(chat_tokens(parts, CUP), None, max_tokens=8).text
    assert (receipt["task"], receipt["reason"], receipt["mode"]) == (None, "below-threshold", "exact")
    assert (receipt["keep"], receipt["profile_id"], receipt["selection"]) == (1.0, None, None)
    assert receipt["similarity"] < parts.retriever.threshold
    assert receipt["experts"] == parts.engine.card.layers * parts.engine.card.experts


def test_a_named_task_is_not_searched_for(client: TestClient) -> None:
    receipt = ask(client, query=CUP, task="sql")["receipt"]
    assert (receipt["task"], receipt["reason"], receipt["similarity"], receipt["mode"]) == (
        "sql",
        "pinned",
        None,
        "mask",
    )


def test_a_task_may_be_served_exactly(client: TestClient) -> None:
    receipt = ask(client, query=EGG, mode="exact")["receipt"]
    assert (receipt["task"], receipt["served_task"], receipt["mode"]) == ("cooking", None, "exact")


def test_size_and_scorer_can_be_chosen(client: TestClient, selection_named: Named) -> None:
    receipt = ask(client, query=EGG, keep=0.25, scorer="random")["receipt"]
    assert (receipt["keep"], receipt["scorer"]) == (0.25, "random")
    assert receipt["selection"] == selection_named("cooking-random-0.25").digest


def test_sampling_reaches_the_engine(
    client: TestClient, parts: Parts, generated: Generated, selection_named: Named
) -> None:
    options = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.8, "seed": 5}
    alone = generated(chat_tokens(parts, EGG), selection_named("cooking-reap-0.5"), **options)
    assert ask(client, query=EGG, **options)["answer"] == alone.text
    assert ask(client, query=EGG, **options)["answer"] != ask(client, query=EGG, **options | {"seed": 6})["answer"]


def test_a_stop_string_ends_the_answer(client: TestClient) -> None:
    whole = ask(client, query=EGG)["answer"]
    stop = whole[2:4]
    answer = ask(client, query=EGG, stop=[stop])
    assert answer["answer"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"


def test_generation_can_go_past_the_end_token(
    client: TestClient, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts.engine.tokenizer, "eos", frozenset(range(parts.engine.card.vocab)))
    assert ask(client, query=EGG)["receipt"]["completion_tokens"] == 1
    assert ask(client, query=EGG, ignore_eos=True)["receipt"]["completion_tokens"] == 8


def test_without_a_limit_the_settings_one_holds(client: TestClient, parts: Parts) -> None:
    answer = client.post("/v1/query", json={"query": EGG, "stop": "\n"}).json()
    tokens = answer["receipt"]["completion_tokens"]
    room = parts.max_context - answer["receipt"]["prompt_tokens"]
    assert tokens == min(room, parts.settings.answer_tokens) or answer["finish_reason"] == "stop"


def test_a_stream_gives_task_tokens_and_the_whole_answer(
    client: TestClient, events_of: Callable[[str], list[tuple[str, Any]]]
) -> None:
    plain = ask(client, query=EGG)
    streamed = client.post("/v1/query", json={"query": EGG, "max_tokens": 8, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = events_of(streamed.text)
    assert [name for name, _ in events] == ["task", *["token"] * (len(events) - 2), "done"]
    assert events[0][1]["task"] == "cooking"
    assert "".join(data["text"] for name, data in events if name == "token") == plain["answer"]
    done = events[-1][1]
    assert done["answer"] == plain["answer"]
    assert done.keys() == plain.keys()
    assert done["receipt"]["selection"] == plain["receipt"]["selection"]


def test_every_decision_is_stored(client: TestClient, parts: Parts) -> None:
    client.post("/v1/query", json={"query": CUP, "max_tokens": 1}, headers={"x-request-id": "audit-1"})
    client.post("/v1/query", json={"query": EGG, "max_tokens": 1, "task": "sql"}, headers={"x-request-id": "audit-2"})
    second, first = parts.store.decisions.list(2)
    assert (first.request, first.task, first.nearest is not None, first.mode) == ("audit-1", None, True, "exact")
    assert (first.reason, first.threshold) == ("below-threshold", parts.retriever.threshold)
    assert (second.request, second.task, second.reason, second.mode) == ("audit-2", "sql", "pinned", "mask")
    assert first.query_hash != second.query_hash


def test_a_refused_choice_is_stored_too(client: TestClient, parts: Parts) -> None:
    status, _ = refusal(client, query=EGG, keep=0.7)
    assert status == 400
    [last] = parts.store.decisions.list(1)
    assert (last.task, last.reason) == ("cooking", "retrieved")


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({}, 400, "query", "missing"),
        ({"query": ""}, 400, "query", "at least 1 character"),
        ({"query": "  "}, 400, "query", "there is none"),
        ({"query": 5}, 400, "query", "valid string"),
        ({"query": "\ud800"}, 400, "query", "nicode"),
        ({"query": EGG, "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"query": EGG, "max_tokens": True}, 400, "max_tokens", "valid integer"),
        ({"query": EGG, "temperature": 3}, 400, "temperature", "less than or equal to 2"),
        ({"query": EGG, "top_p": 0}, 400, "top_p", "greater than 0"),
        ({"query": EGG, "seed": 2**63}, 400, "seed", "less than"),
        ({"query": EGG, "stop": [""]}, 400, "stop[0]", "at least 1 character"),
        ({"query": EGG, "stop": ["x"] * 17}, 400, "stop", "at most 16"),
        ({"query": EGG, "keep": 0}, 400, "keep", "greater than 0"),
        ({"query": EGG, "temprature": 1}, 400, "temprature", "not a field"),
        ({"query": EGG, "mode": "automatic"}, 400, "mode", "No mode is named"),
        ({"query": EGG, "mode": "fast"}, 400, "mode", "No mode is named 'fast'"),
        ({"query": EGG, "mode": "exact", "keep": 0.5}, 400, "keep", "exact mode uses none"),
        ({"query": EGG, "keep": 0.7}, 400, "keep", "it has: 0.25, 0.5, 1"),
        ({"query": EGG, "scorer": "best"}, 400, "scorer", "it has: frequency, random, reap, tcess"),
        ({"query": EGG, "keep": 1.0}, 422, None, "Serve with --memory"),
        ({"query": EGG, "task": "knitting"}, 404, None, "cooking, sql, unproven"),
        ({"query": EGG, "task": "stranger"}, 409, None, "a profile of another model"),
        ({"query": EGG, "task": "unproven"}, 400, "mode", "no stored evaluation"),
        ({"query": CUP, "mode": "mask"}, 400, "task", "No task is near enough"),
        ({"query": "egg " * 300, "max_tokens": 8, "task": "sql"}, 400, "query", "the context holds 256"),
        ({"query": EGG, "max_tokens": 250}, 400, "max_tokens", "the context holds 256"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_refused_by_name_before_anything_is_sent(
    client: TestClient, body: dict[str, Any], status: int, param: str | None, words: str, stream: bool
) -> None:
    answer = client.post("/v1/query", content=json.dumps({**body, "stream": stream}), headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_context_that_is_too_short_has_openais_code(client: TestClient) -> None:
    _, error = refusal(client, query=EGG, max_tokens=250)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("content", "headers", "words"),
    [
        (b"{", JSON, "not JSON"),
        (b"", JSON, "JSON object"),
        (b"[1]", JSON, "JSON object"),
        (b'{"query": "x"}', {"content-type": "text/plain"}, "application/json"),
        (b'{"query": "\xff"}', JSON, "JSON"),
        (b'{"query": "x", "temperature": NaN}', JSON, "finite"),
    ],
)
def test_a_body_that_is_not_json_is_refused(
    client: TestClient, content: bytes, headers: dict[str, str], words: str
) -> None:
    answer = client.post("/v1/query", content=content, headers=headers)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
