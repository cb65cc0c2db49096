"""Every field that real clients send, one by one: it works, is refused by name, or is named as ignored."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

import service.constrain
from engine.constraints import Words
from engine.requests import FinishedEvent
from service.bodies import ChatBody, CompletionBody
from service.parts import Parts
from store.records import Selection

EGG = "how long do I boil an egg"
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
Found = dict[str, Any]
Events = Callable[[str], list[tuple[str, Any]]]


def chat(client: TestClient, **fields: Any) -> Found:
    body = {"model": "tiny", "messages": [{"role": "user", "content": EGG}], "max_tokens": 8, **fields}
    answer = client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def complete(client: TestClient, **fields: Any) -> Found:
    answer = client.post(COMPLETE, json={"model": "tiny", "prompt": EGG, "max_tokens": 8, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def text_of(found: Found, place: int = 0) -> str:
    return str(found["choices"][place]["message"]["content"])


def reason_of(found: Found) -> str:
    return str(found["choices"][0]["finish_reason"])


Check = Callable[[Found, Found], bool]  # of the plain greedy answer, and of the answer with the field

# Clients' fields with values that ask for something, and what must then be true of the answer.
WORKS: list[tuple[Found, Check]] = [
    ({"model": "tiny:sql"}, lambda _, a: a["usage"]["expert"]["task"] == "sql"),
    ({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": EGG}]},
     lambda p, a: a["usage"]["prompt_tokens"] > p["usage"]["prompt_tokens"]),
    ({"max_tokens": 3}, lambda p, a: text_of(p).startswith(text_of(a)) and a["usage"]["completion_tokens"] == 3),
    ({"max_tokens": None, "max_completion_tokens": 3}, lambda _, a: a["usage"]["completion_tokens"] == 3),
    ({"temperature": 1.9, "seed": 5}, lambda p, a: text_of(a) != text_of(p)),
    ({"temperature": 1.9, "seed": 5, "top_p": 1e-9}, lambda p, a: text_of(a) == text_of(p)),
    ({"temperature": 1.9, "seed": 5, "top_k": 1}, lambda p, a: text_of(a) == text_of(p)),
    ({"temperature": 1.9, "seed": 5, "min_p": 1.0}, lambda p, a: text_of(a) == text_of(p)),
    ({"logit_bias": {"65": 100}}, lambda _, a: text_of(a) == "A" * 8),
    ({"logit_bias": {"65": 100}, "frequency_penalty": 2, "max_tokens": 100},
     lambda _, a: 2 < text_of(a).count("A") < 70),
    ({"logit_bias": {"65": 20}, "presence_penalty": 2, "repetition_penalty": 10},
     lambda _, a: text_of(a).count("A") < 8),
    ({"stop": "A", "logit_bias": {"65": 100}}, lambda _, a: (text_of(a), reason_of(a)) == ("", "stop")),
    ({"stop": ["x", "AA"], "logit_bias": {"65": 100}, "include_stop_str_in_output": True},
     lambda _, a: (text_of(a), reason_of(a)) == ("AA", "stop")),
    ({"stop": "A", "logit_bias": {"65": 100}, "min_tokens": 4}, lambda _, a: text_of(a) == "AAAA"),
    ({"stop": None}, lambda p, a: text_of(a) == text_of(p)),
    ({"stop_token_ids": [65], "logit_bias": {"65": 100}},
     lambda _, a: (a["usage"]["completion_tokens"], reason_of(a)) == (1, "stop")),
    ({"logit_bias": {"258": 100}}, lambda _, a: (text_of(a), reason_of(a)) == ("", "stop")),
    ({"logit_bias": {"258": 100}, "min_tokens": 3}, lambda _, a: a["usage"]["completion_tokens"] == 4),
    ({"logit_bias": {"258": 100}, "ignore_eos": True}, lambda _, a: a["usage"]["completion_tokens"] == 8),
    ({"n": 3}, lambda p, a: [text_of(a, i) for i in range(3)] == [text_of(p)] * 3),
    ({"logprobs": True}, lambda _, a: len(a["choices"][0]["logprobs"]["content"]) == 8),
    ({"logprobs": True, "top_logprobs": 2},
     lambda _, a: all(len(e["top_logprobs"]) == 2 for e in a["choices"][0]["logprobs"]["content"])),
    ({"response_format": {"type": "json_object"}, "max_tokens": 60},
     lambda _, a: isinstance(json.loads(text_of(a)), dict)),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "boolean"}}}},
     lambda _, a: text_of(a) in ("true", "false")),
    ({"guided_json": '{"enum": [1, 2]}'}, lambda _, a: text_of(a) in ("1", "2")),
    ({"guided_regex": "[xyz]{2}"}, lambda _, a: len(text_of(a)) == 2 and set(text_of(a)) <= set("xyz")),
    ({"guided_choice": ["left", "right"]}, lambda _, a: text_of(a) in ("left", "right")),
    ({"guided_grammar": 'start: "a" "b"?'}, lambda _, a: text_of(a) in ("a", "ab")),
    ({"structured_outputs": {"choice": ["p", "q"]}}, lambda _, a: text_of(a) in ("p", "q")),
    ({"structured_outputs": {"json": {"type": "null"}}}, lambda _, a: text_of(a) == "null"),
    ({"structured_outputs": {"json_object": True}, "max_tokens": 60},
     lambda _, a: isinstance(json.loads(text_of(a)), dict)),
    ({"structured_outputs": {"regex": "1+2"}, "max_tokens": 90}, lambda _, a: set(text_of(a)) <= {"1", "2"}),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
     lambda p, a: text_of(a) == text_of(p)),
    ({"expert": {"mode": "exact"}}, lambda _, a: a["usage"]["expert"]["mode"] == "exact"),
]  # fmt: skip

# Labels, and values that ask for nothing.
QUIET: list[Found] = [
    {"user": "me"}, {"metadata": {"a": "b"}}, {"store": False}, {"service_tier": "auto"}, {"parallel_tool_calls": True},
    {"n": None}, {"seed": None}, {"stream": None}, {"stream_options": None}, {"tools": None}, {"tools": []},
    {"tool_choice": "auto"}, {"tool_choice": "none"}, {"response_format": {"type": "text"}}, {"modalities": ["text"]},
    {"chat_template_kwargs": {}}, {"reasoning_effort": None}, {"top_k": -1}, {"min_tokens": 0}, {"best_of": 1},
    {"repetition_penalty": 1.0}, {"logprobs": False, "top_logprobs": 0}, {"logit_bias": {}}, {"functions": []},
    {"prompt_logprobs": None, "truncate_prompt_tokens": None},
]  # fmt: skip

# What this model, or this service, does not read: named in the receipt.
IGNORED: list[tuple[Found, list[str]]] = [
    ({"reasoning_effort": "high"}, ["reasoning_effort"]),
    ({"chat_template_kwargs": {"enable_thinking": False, "messages": []}},
     ["chat_template_kwargs.enable_thinking", "chat_template_kwargs.messages"]),
    ({"verbosity": "low", "temprature": 1}, ["temprature", "verbosity"]),
]  # fmt: skip

REFUSED: list[tuple[Found, str]] = [
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),  # rows of one request that the queue can't hold
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"logit_bias": {"egg": 1}}, "logit_bias"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),  # more digits than Python turns into a number
    ({"logit_bias": {"\u0665": 1}}, "logit_bias"),  # a five, in Arabic
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"temperature": 2.1}, "temperature"),
    ({"min_p": 2}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"min_tokens": 9}, "min_tokens"),
    ({"stop": [""] * 2}, "stop[0]"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
    ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "odd"}}}]}, "tools"),
    ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"prediction": {"type": "content"}}, "prediction"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
]


def test_the_tables_have_every_field_that_the_bodies_know() -> None:
    tried = {name for fields, *_ in (*WORKS, *IGNORED, *REFUSED) for name in fields} | {n for f in QUIET for n in f}
    known = set(ChatBody.model_fields) | set(ChatBody.NEUTRAL)
    assert known - tried <= {"stream", "audio", "function_call", "web_search_options"}  # test_chat has streams
    assert set(CompletionBody.model_fields) - set(ChatBody.model_fields) == {"prompt", "echo", "best_of"}


@pytest.mark.parametrize(("fields", "check"), WORKS, ids=[str(fields)[:60] for fields, _ in WORKS])
def test_a_field_does_what_it_says(client: TestClient, fields: Found, check: Check) -> None:
    found = chat(client, **fields)
    assert check(chat(client), found), found
    assert found["usage"]["expert"] if fields.get("n") else found["usage"]["expert"]["ignored"] == []


@pytest.mark.parametrize("fields", QUIET, ids=str)
def test_what_asks_for_nothing_changes_nothing(client: TestClient, fields: Found) -> None:
    found = chat(client, **fields)
    assert text_of(found) == text_of(chat(client))
    assert found["usage"]["expert"]["ignored"] == []


@pytest.mark.parametrize(("fields", "names"), IGNORED, ids=str)
def test_what_has_no_effect_is_named(client: TestClient, fields: Found, names: list[str]) -> None:
    found = chat(client, **fields)
    assert text_of(found) == text_of(chat(client))
    assert found["usage"]["expert"]["ignored"] == names


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=str)
def test_what_can_not_be_done_is_refused_by_name(client: TestClient, fields: Found, param: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": EGG}], "max_tokens": 8, **fields}
    answer = client.post(CHAT, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    assert len(error["message"]) > 20


def test_what_the_load_generators_send_is_understood(client: TestClient) -> None:
    """vllm's chat and completions, and GuideLLM's."""
    parts = [{"type": "text", "text": EGG}]
    found = chat(
        client, messages=[{"role": "user", "content": parts}], max_tokens=None, max_completion_tokens=8, ignore_eos=True
    )
    assert (text_of(found), found["usage"]["completion_tokens"]) == (text_of(chat(client, ignore_eos=True)), 8)
    plain = {"temperature": 0.0, "repetition_penalty": 1.0, "logprobs": None, "stream": False}
    assert complete(client, **plain)["choices"] == complete(client)["choices"]
    assert complete(client, stop=None, ignore_eos=True)["usage"]["completion_tokens"] == 8


def test_several_answers_differ_by_seeds_that_follow_from_the_requests(client: TestClient) -> None:
    fields: Found = {"temperature": 1.5, "seed": 11}
    first, again = chat(client, n=4, **fields), chat(client, n=4, **fields)
    texts = [text_of(first, place) for place in range(4)]
    assert texts == [text_of(again, place) for place in range(4)]
    assert len(set(texts)) == 4
    assert texts[0] == text_of(chat(client, **fields))
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2, 3]
    alone = chat(client, **fields)["usage"]
    assert first["usage"]["prompt_tokens"] == alone["prompt_tokens"]
    assert first["usage"]["completion_tokens"] > alone["completion_tokens"]
    assert len(first["usage"]["expert"]) == 4


def test_several_answers_stream_side_by_side(client: TestClient, events_of: Events) -> None:
    fields: Found = {"temperature": 1.5, "seed": 11, "n": 3}
    whole = chat(client, **fields)
    body = {"model": "tiny", "messages": [{"role": "user", "content": EGG}], "max_tokens": 8, "stream": True, **fields}
    texts, roles = ["", "", ""], [0, 0, 0]
    for _, chunk in events_of(client.post(CHAT, json=body).text)[:-1]:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        roles[choice["index"]] += "role" in choice["delta"]
    assert texts == [text_of(whole, place) for place in range(3)]
    assert roles == [1, 1, 1]


def test_the_prompt_of_several_answers_goes_through_once(
    client: TestClient, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, int]] = []
    real = parts.engine.passes.step

    def step(ids: Any, *rest: Any) -> Any:
        passes.append(tuple(ids.shape))
        return real(ids, *rest)

    monkeypatch.setattr(parts.engine.passes, "step", step)
    answer = complete(client, n=3, temperature=1.5, seed=11)
    assert passes[0] == (1, answer["usage"]["prompt_tokens"])
    assert all(new == 1 for _, new in passes[1:])


def test_best_of_gives_the_likeliest_and_counts_all(client: TestClient) -> None:
    fields: Found = {"temperature": 1.5, "seed": 11, "logprobs": 0}
    whole = complete(client, n=4, **fields)
    all_four = whole["choices"]
    best = complete(client, best_of=4, **fields)
    mean = lambda choice: sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["token_logprobs"])  # noqa: E731
    assert best["choices"][0]["text"] == max(all_four, key=mean)["text"]
    assert best["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] > 8
    assert [c["text"] for c in complete(client, best_of=4, n=2, **fields)["choices"]] == [
        c["text"] for c in sorted(all_four, key=mean, reverse=True)[:2]
    ]
    for fields, param in (({"best_of": 4, "stream": True}, "best_of"), ({"best_of": 1, "n": 2}, "best_of")):
        answer = client.post(COMPLETE, json={"model": "tiny", "prompt": EGG, **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_log_probabilities_are_those_of_the_model_inside_its_selection(
    client: TestClient, parts: Parts, generated: Callable[..., FinishedEvent],
    selection_named: Callable[[str], Selection],
) -> None:  # fmt: skip
    prompt = parts.engine.tokenizer.encode_chat([{"role": "user", "content": EGG}])
    alone = generated(prompt, selection_named("cooking-reap-0.5"), max_tokens=8, logprobs=3)
    entries = chat(client, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == pytest.approx([score.logprob for score in alone.scores], abs=1e-5)
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace") == alone.text
    for entry, score in zip(entries, alone.scores, strict=True):
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx([p for _, p in score.top], abs=1e-5)
        assert sum(math.exp(top["logprob"]) for top in entry["top_logprobs"]) < 1


def test_log_probabilities_stream_with_their_text(client: TestClient, events_of: Events) -> None:
    whole = chat(client, logprobs=True, top_logprobs=1)["choices"][0]["logprobs"]["content"]
    body = {"model": "tiny", "messages": [{"role": "user", "content": EGG}], "max_tokens": 8, "stream": True}
    answer = client.post(CHAT, json={**body, "logprobs": True, "top_logprobs": 1})
    streamed = [chunk["choices"][0]["logprobs"] for _, chunk in events_of(answer.text)[:-1]]
    entries = [entry for found in streamed if found for entry in found["content"]]
    assert [entry["token"] for entry in entries] == [entry["token"] for entry in whole]
    assert [e["logprob"] for e in entries] == pytest.approx([e["logprob"] for e in whole], abs=1e-5)


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_echo_scores_the_prompt_as_evaluation_harnesses_need(client: TestClient, parts: Parts, limit: int) -> None:
    """Lists of token ids, `echo`, `logprobs`: the sum over a continuation is its log-likelihood."""
    context, continuation = "how long do I boil", " an egg"
    tokenizer = parts.engine.tokenizer
    whole = list(tokenizer.encode(context + continuation))
    start = len(tokenizer.encode(context))
    fields: Found = {"prompt": [whole, whole[:start]], "max_tokens": limit, "echo": True, "logprobs": 1, "seed": 1}
    first, second = complete(client, model="tiny:cooking", temperature=0, **fields)["choices"]
    found = first["logprobs"]
    assert first["text"].startswith(context + continuation)
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(whole) + limit
    assert found["tokens"][start : len(whole)] == list(continuation)
    assert found["text_offset"][: len(whole)] == list(range(len(whole)))
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    columns = zip(found["token_logprobs"], found["top_logprobs"], found["tokens"], strict=True)
    for place, (logprob, top, token) in enumerate(columns):
        assert not place or (top[token] == logprob <= max(top.values()) <= 0)
        assert place < len(whole) or logprob == max(top.values())  # the answer is greedy
    assert second["logprobs"]["token_logprobs"][1:start] == pytest.approx(found["token_logprobs"][1:start], abs=1e-4)


def test_lm_evals_own_bodies_give_what_it_reads(client: TestClient, parts: Parts) -> None:
    """As lm_eval 0.4.13's `local-completions` sent them to a live service, and how it reads the replies."""
    tokenizer = parts.engine.tokenizer
    context, whole = tokenizer.encode("how long"), list(tokenizer.encode("how long do I"))
    scoring = {"model": "tiny:cooking", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = client.post(COMPLETE, json={"prompt": [whole, whole[:2]], **scoring}).json()["choices"]
    for choice, start in zip(sorted(choices, key=lambda one: one["index"]), (len(context), 1), strict=True):
        scores, tops = (choice["logprobs"][name][start:-1] for name in ("token_logprobs", "top_logprobs"))
        assert len(scores) == len(tops) > 0
        assert sum(scores) < 0
        assert all(score <= max(top.values()) for score, top in zip(scores, tops, strict=True))
    until = {"model": "tiny:cooking", "max_tokens": 4, "temperature": 0, "stop": ["\n", "<|end|>"], "seed": 1234}
    [answer] = client.post(COMPLETE, json={"prompt": [whole], **until}).json()["choices"]
    assert (answer["index"], isinstance(answer["text"], str)) == (0, True)
    assert not answer["text"].startswith("how")  # the continuation alone


def test_echo_streams_too(client: TestClient, events_of: Events) -> None:
    fields: Found = {"prompt": EGG, "max_tokens": 4, "echo": True, "logprobs": 0}
    whole = complete(client, **fields)["choices"][0]
    chunks = events_of(client.post(COMPLETE, json={"model": "tiny", "stream": True, **fields}).text)[:-1]
    choices = [chunk["choices"][0] for _, chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    found = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert [token for one in found for token in one["tokens"]] == whole["logprobs"]["tokens"]
    assert [offset for one in found for offset in one["text_offset"]] == whole["logprobs"]["text_offset"]


def test_scoring_without_echo_makes_no_sense_and_is_refused(client: TestClient) -> None:
    answer = client.post(COMPLETE, json={"model": "tiny", "prompt": EGG, "max_tokens": 0})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")


def test_echo_without_scores_gives_the_text_alone(client: TestClient) -> None:
    found = complete(client, echo=True, max_tokens=0)
    assert (found["choices"][0]["text"], found["choices"][0]["logprobs"]) == (EGG, None)
    assert found["usage"]["completion_tokens"] == 0


def test_options_of_a_stream_without_one_are_named_as_ignored(client: TestClient) -> None:
    found = chat(client, stream_options={"include_usage": True})
    assert found["usage"]["expert"]["ignored"] == ["stream_options"]


def test_options_of_a_stream_may_be_null(client: TestClient) -> None:
    body = {"model": "tiny", "prompt": EGG, "max_tokens": 2, "stream": True}
    answer = client.post(COMPLETE, json={**body, "stream_options": {"include_usage": None}})
    assert answer.status_code == 200
    assert '"choices": []' not in answer.text
    assert '"ignored": []' in answer.text


def test_what_a_stream_can_not_be_told_is_named_in_its_receipt(client: TestClient) -> None:
    body = {"model": "tiny", "prompt": EGG, "max_tokens": 2, "stream": True}
    for wanted, named in ((True, '"ignored": ["stream_options.include_obfuscation"]'), (False, '"ignored": []')):
        answer = client.post(COMPLETE, json={**body, "stream_options": {"include_obfuscation": wanted}})
        assert named in answer.text


def test_exact_mode_needs_no_text_to_retrieve_by(client: TestClient) -> None:
    messages = [{"role": "system", "content": "Say hello."}]
    receipt = chat(client, messages=messages, expert={"mode": "exact"})["usage"]["expert"]
    assert (receipt["mode"], receipt["task"], receipt["reason"]) == ("exact", None, "no-text")
    refused = client.post(CHAT, json={"model": "tiny", "messages": messages})
    assert (refused.status_code, "mode exact" in refused.json()["error"]["message"]) == (400, True)


def test_a_grammar_that_waits_behind_others_is_busy_and_one_that_takes_long_is_wrong(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()

    def wait(*_args: object, **_options: object) -> None:
        stuck.wait(20)

    monkeypatch.setattr(service.constrain, "SECONDS", 0.2)
    monkeypatch.setattr(Words, "compile", wait)
    monkeypatch.setattr(service.constrain, "_compilers", ThreadPoolExecutor(1))
    body = {"model": "tiny", "prompt": EGG, "guided_regex": "a+"}
    try:
        first, second = client.post(COMPLETE, json=body), client.post(COMPLETE, json=body)
    finally:
        stuck.set()
    assert (first.status_code, "Use a simpler one" in first.json()["error"]["message"]) == (400, True)
    assert (second.status_code, second.headers["retry-after"]) == (503, "1")
    assert "behind others" in second.json()["error"]["message"]
