"""`POST /v1/chat/completions`: OpenAI's shapes, every field of real clients, streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.requests import FinishedEvent
from service.parts import Parts
from store.records import Selection

EGG = "how long do I boil an egg"
CHAT = "/v1/chat/completions"
Generated = Callable[..., FinishedEvent]
Events = Callable[[str], list[tuple[str, Any]]]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": EGG}], "max_tokens": 8, **fields}


def test_an_answer_has_openais_shape_and_the_receipt(
    client: TestClient, parts: Parts, generated: Generated, selection_named: Callable[[str], Selection]
) -> None:
    prompt = parts.engine.tokenizer.encode_chat([{"role": "user", "content": EGG}])
    alone = generated(prompt, selection_named("cooking-reap-0.5"), max_tokens=8)
    answer = client.post(CHAT, json=body())
    found = answer.json()
    assert (found["object"], found["model"]) == ("chat.completion", "tiny")
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": alone.text},
            "logprobs": None,
            "finish_reason": alone.reason,
        }
    ]
    usage = found["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        len(prompt),
        alone.completion_tokens,
        len(prompt) + alone.completion_tokens,
    )
    assert (usage["expert"]["task"], usage["expert"]["keep"]) == ("cooking", 0.5)


def test_the_receipt_is_in_headers_too(client: TestClient) -> None:
    answer = client.post(CHAT, json=body())
    receipt = answer.json()["usage"]["expert"]
    headers = {name.removeprefix("x-expert-"): v for name, v in answer.headers.items() if name.startswith("x-expert-")}
    assert headers == {
        "task": "cooking",
        "mode": "mask",
        "keep": "0.5",
        "reason": "retrieved",
        "profile": "p-cooking",
        "doubts": "0",
        "experts": str(receipt["experts"]),
        "experts-paged": str(receipt["experts_paged"]),
        "bytes-paged": str(receipt["bytes_paged"]),
        "escalated": "none",
    }


def test_a_stream_is_openais(client: TestClient, events_of: Events) -> None:
    whole = client.post(CHAT, json=body()).json()
    answer = client.post(CHAT, json=body(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-expert-task"] == "cooking"
    *chunks, done = [data for _, data in events_of(answer.text)]
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert deltas[0]["content"]
    assert not any("role" in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["expert"]["selection"] == whole["usage"]["expert"]["selection"]
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_last_with_no_choices_where_it_is_asked_for(client: TestClient, events_of: Events) -> None:
    answer = client.post(CHAT, json=body(stream=True, stream_options={"include_usage": True}))
    *chunks, last, done = [data for _, data in events_of(answer.text)]
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert last["usage"]["expert"]["task"] == "cooking"
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)


def test_usage_of_every_chunk_counts_up(client: TestClient, events_of: Events) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = client.post(CHAT, json=body(stream=True, stream_options=options))
    chunks = [data for _, data in events_of(answer.text)][:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == 8


def test_an_empty_answer_still_opens_with_the_role(client: TestClient, events_of: Events) -> None:
    first = client.post(CHAT, json=body()).json()["choices"][0]["message"]["content"][0]
    chunks = [d for _, d in events_of(client.post(CHAT, json=body(stream=True, stop=first)).text)][:-1]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [{"role": "assistant", "content": ""}]
    assert chunks[0]["choices"][0]["finish_reason"] == "stop"


def test_the_last_user_message_finds_the_task_and_all_messages_make_the_prompt(
    client: TestClient, parts: Parts
) -> None:
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "select rows from orders"},
        {"role": "assistant", "content": "Done."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "how long do "}, {"type": "text", "text": "I boil an egg"}],
        },
        {"role": "assistant", "content": "It takes"},
    ]
    usage = client.post(CHAT, json=body(messages=messages)).json()["usage"]
    assert usage["expert"]["task"] == "cooking"
    turns = [("system", "Be short."), ("user", "select rows from orders"), ("assistant", "Done."), ("user", EGG),
             ("assistant", "It takes")]  # fmt: skip
    prompt = parts.engine.tokenizer.encode_chat([{"role": role, "content": text} for role, text in turns])
    assert usage["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "tiny:sql"},
        {"expert": {"task": "sql"}},
        {"model": "tiny:sql", "expert": {"task": "sql", "mode": "mask"}},
    ],
)
def test_a_task_is_pinned_by_the_models_name_or_in_the_body(client: TestClient, fields: dict[str, Any]) -> None:
    receipt = client.post(CHAT, json=body(**fields)).json()["usage"]["expert"]
    assert (receipt["task"], receipt["reason"]) == ("sql", "pinned")


def test_mode_keep_and_scorer_are_chosen_in_the_body(client: TestClient) -> None:
    receipt = client.post(CHAT, json=body(expert={"keep": 0.25, "scorer": "tcess"})).json()["usage"]["expert"]
    assert (receipt["keep"], receipt["scorer"]) == (0.25, "tcess")
    receipt = client.post(CHAT, json=body(expert={"mode": "exact"})).json()["usage"]["expert"]
    assert (receipt["mode"], receipt["task"]) == ("exact", "cooking")


def test_only_assistant_turns_need_a_named_task(client: TestClient) -> None:
    messages = [{"role": "system", "content": "Go on."}]
    error = client.post(CHAT, json=body(messages=messages)).json()["error"]
    assert error["param"] == "messages"
    assert client.post(CHAT, json=body(messages=messages, model="tiny:sql")).status_code == 200


NEUTRAL: dict[str, Any] = {
    "n": 1, "best_of": None, "logprobs": False, "top_logprobs": None, "logit_bias": {}, "presence_penalty": 0,
    "frequency_penalty": 0.0, "repetition_penalty": 1.0, "top_k": -1, "min_p": 0, "min_tokens": 0, "tools": [],
    "tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"}, "user": "me",
    "metadata": {"a": "b"}, "reasoning_effort": None, "chat_template_kwargs": {}, "stop": None, "seed": None,
    "stream": None, "stream_options": None, "ignore_eos": False, "temperature": None, "top_p": None,
    "modalities": ["text"], "store": False, "service_tier": "auto",
}  # fmt: skip


def test_fields_that_ask_for_nothing_are_accepted(client: TestClient) -> None:
    answer = client.post(CHAT, json=body(**NEUTRAL))
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["expert"]["ignored"] == []


def test_a_field_that_nobody_knows_is_named_in_the_receipt(client: TestClient) -> None:
    receipt = client.post(CHAT, json=body(temprature=0.5, use_magic=True)).json()["usage"]["expert"]
    assert receipt["ignored"] == ["temprature", "use_magic"]


def test_both_names_of_the_limit_work(client: TestClient) -> None:
    fields = body(max_completion_tokens=3)
    del fields["max_tokens"]
    assert client.post(CHAT, json=fields).json()["usage"]["completion_tokens"] == 3
    assert client.post(CHAT, json=body(max_completion_tokens=8)).status_code == 200
    assert client.post(CHAT, json=body(max_completion_tokens=3)).json()["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"top_logprobs": 3}, 400, "top_logprobs"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"functions": [{"name": "f"}]}, 400, "functions"),
        ({"modalities": ["text", "audio"]}, 400, "modalities"),
        ({"temperature": -1}, 400, "temperature"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0]"),
        ({"messages": [{"role": "function", "content": "x"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "messages[0].content[0].type",
        ),
        ({"expert": {"tau": 0.5}}, 400, "expert.tau"),
        ({"expert": {"mode": "automatic"}}, 400, "mode"),
        ({"expert": {"task": "knitting"}}, 404, None),
        ({"model": "tiny:sql", "expert": {"task": "cooking"}}, 400, "expert.task"),
        ({"model": "tiny:knitting"}, 404, None),
        ({"model": "gpt-4o"}, 404, None),
        ({"model": None}, 400, "model"),
        ({"max_tokens": 100_000}, 400, "max_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_can_not_be_honoured_is_refused_by_name(
    client: TestClient, fields: dict[str, Any], status: int, param: str | None, stream: bool
) -> None:
    answer = client.post(CHAT, json={**body(stream=stream), **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}


def test_an_unknown_model_has_openais_code(client: TestClient) -> None:
    assert client.post(CHAT, json=body(model="gpt-4o")).json()["error"]["code"] == "model_not_found"
