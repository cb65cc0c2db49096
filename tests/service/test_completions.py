"""`POST /v1/completions`: texts, token ids, several prompts at once, streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.requests import FinishedEvent
from service.parts import Parts
from store.records import Selection

EGG, ROWS = "how long do I boil an egg", "select rows from orders"
COMPLETE = "/v1/completions"
Events = Callable[[str], list[tuple[str, Any]]]


def complete(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post(COMPLETE, json={"model": "tiny", "max_tokens": 6, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_text_is_continued_as_it_is(
    client: TestClient,
    parts: Parts,
    generated: Callable[..., FinishedEvent],
    selection_named: Callable[[str], Selection],
) -> None:
    alone = generated(parts.engine.tokenizer.encode(EGG), selection_named("cooking-reap-0.5"), max_tokens=6)
    found = complete(client, prompt=EGG)
    assert found["object"] == "text_completion"
    assert found["choices"] == [{"index": 0, "text": alone.text, "logprobs": None, "finish_reason": alone.reason}]
    assert found["usage"]["expert"]["task"] == "cooking"


def test_token_ids_say_the_same_as_their_text(client: TestClient, parts: Parts) -> None:
    ids = list(parts.engine.tokenizer.encode(EGG))
    assert complete(client, prompt=ids)["choices"] == complete(client, prompt=EGG)["choices"]


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts_each_get_their_own_task(client: TestClient, parts: Parts, as_ids: bool) -> None:
    texts = [EGG, ROWS, EGG]
    prompt = [list(parts.engine.tokenizer.encode(text)) for text in texts] if as_ids else texts
    answer = client.post(COMPLETE, json={"model": "tiny", "max_tokens": 6, "prompt": prompt})
    found = answer.json()
    alone = [complete(client, prompt=text)["choices"][0]["text"] for text in texts]
    assert [(c["index"], c["text"]) for c in found["choices"]] == list(enumerate(alone))
    assert [receipt["task"] for receipt in found["usage"]["expert"]] == ["cooking", "sql", "cooking"]
    assert found["usage"]["completion_tokens"] == 18
    assert answer.headers["x-expert-task"] == "cooking,sql,cooking"


def test_several_prompts_stream_side_by_side(client: TestClient, events_of: Events) -> None:
    fields = {"prompt": [EGG, ROWS], "stream": True, "stream_options": {"include_usage": True}}
    answer = client.post(COMPLETE, json={"model": "tiny", "max_tokens": 6, **fields})
    *chunks, last, done = [data for _, data in events_of(answer.text)]
    texts = ["", ""]
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [complete(client, prompt=text)["choices"][0]["text"] for text in (EGG, ROWS)]
    assert done == "[DONE]"
    assert [receipt["task"] for receipt in last["usage"]["expert"]] == ["cooking", "sql"]


def test_without_a_limit_a_completion_has_openais_sixteen_tokens(client: TestClient) -> None:
    found = client.post(COMPLETE, json={"model": "tiny", "prompt": EGG}).json()
    assert found["usage"]["completion_tokens"] == 16 or found["choices"][0]["finish_reason"] == "stop"


def test_what_benchmarks_send_is_accepted(client: TestClient) -> None:
    fields = {
        "logprobs": None,
        "repetition_penalty": 1.0,
        "ignore_eos": False,
        "echo": False,
        "best_of": 1,
        "suffix": None,
    }
    assert complete(client, prompt=EGG, **fields)["usage"]["expert"]["ignored"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [EGG, ""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [5, 100_000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": {"text": EGG}}, "prompt"),
        ({"prompt": [True, False]}, "prompt[0]"),
        ({"prompt": EGG, "suffix": "x"}, "suffix"),
        ({"prompt": "egg " * 200, "model": "tiny:sql"}, "prompt"),
    ],
)
def test_bad_prompts_and_fields_are_refused_by_name(client: TestClient, fields: dict[str, Any], param: str) -> None:
    answer = client.post(COMPLETE, json={"model": "tiny", "max_tokens": 4, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error


def test_one_bad_prompt_refuses_all_and_queues_none(client: TestClient, parts: Parts) -> None:
    answer = client.post(COMPLETE, json={"model": "tiny:sql", "max_tokens": 4, "prompt": [EGG, "egg " * 200]})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert (parts.worker.waiting, parts.worker.running) == (0, 0)
