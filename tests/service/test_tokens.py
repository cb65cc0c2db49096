"""Tokens and embeddings over HTTP, against the tokenizer and the embedder themselves."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from waiting import wait_for

import service.desk
from engine.text import Tokenizer
from service.app import create_app
from service.parts import Parts
from service.routes import tokens
from store.records import F32

Live = Callable[[FastAPI], AbstractContextManager[str]]


def test_text_becomes_the_models_tokens_and_text_again(client: TestClient, parts: Parts) -> None:
    found = client.post("/tokenize", json={"model": "tiny", "prompt": "boil an egg"}).json()
    assert found["tokens"] == list(parts.engine.tokenizer.encode("boil an egg"))
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), parts.max_context)
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "boil an egg"}
    wrong = client.post("/detokenize", json={"tokens": [10**6]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tokens")


@pytest.mark.parametrize("form", [None, "float"])
def test_the_openai_client_gets_the_retrievers_vectors(
    app: FastAPI, parts: Parts, live: Callable[[FastAPI], AbstractContextManager[str]], form: str | None
) -> None:
    texts = ["boil an egg", "select rows"]
    more = {} if form is None else {"encoding_format": form}
    with live(app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        found = client.embeddings.create(model="tiny", input=texts, **more)  # type: ignore[arg-type]
    expected = parts.retriever.embedder.embed(texts)
    assert np.array([one.embedding for one in found.data], np.float32) == pytest.approx(expected)
    assert found.model == parts.retriever.embedder.id


def test_nothing_to_embed_is_refused(client: TestClient) -> None:
    for wrong in ("", [], [""], None):
        assert client.post("/v1/embeddings", json={"model": "tiny", "input": wrong}).status_code == 400


def test_messages_are_tokenized_as_a_chat_would_be(client: TestClient, parts: Parts) -> None:
    messages = [{"role": "user", "content": "boil an egg"}]
    found = client.post("/tokenize", json={"messages": messages, "return_token_strs": True}).json()
    usage = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, "max_tokens": 1}).json()
    assert found["tokens"] == list(parts.engine.tokenizer.encode_chat(messages))
    assert found["count"] == usage["usage"]["prompt_tokens"]
    assert "".join(found["token_strs"]).startswith("<user> boil an egg<|end|>")
    for wrong in ({}, {"prompt": "a", "messages": messages}):
        assert client.post("/tokenize", json=wrong).status_code == 400


def test_embeddings_of_another_size_are_refused(client: TestClient, parts: Parts) -> None:
    size = parts.retriever.embedder.dimension
    body = {"model": "tiny", "input": "x"}
    assert client.post("/v1/embeddings", json={**body, "dimensions": size}).status_code == 200
    error = client.post("/v1/embeddings", json={**body, "dimensions": size + 1}).json()["error"]
    assert (error["param"], str(size) in error["message"]) == ("dimensions", True)


class Held:
    """An embedder that waits at each piece until it is let go, and counts the pieces."""

    id = "held"
    dimension = 4

    def __init__(self) -> None:
        self.pieces: list[Sequence[str]] = []
        self.go = threading.Semaphore(0)

    def embed(self, texts: Sequence[str]) -> F32:
        self.pieces.append(texts)
        self.go.acquire(timeout=20)
        return np.ones((len(texts), 4), np.float32)


@pytest.fixture
def held() -> Iterator[Held]:
    embedder = Held()
    yield embedder
    embedder.go.release(10_000)


@pytest.fixture
def holding(parts: Parts, held: Held, request: pytest.FixtureRequest) -> FastAPI:
    """Embeddings stand still, for a second if a test names no other time; queries are retrieved by another embedder, as
    if theirs were free."""
    retriever = parts.retriever.only(frozenset(parts.catalogue.retrievable))
    retriever.embedder = held
    settings = parts.settings.model_copy(update={"request_timeout": getattr(request, "param", 1.0)})
    return create_app(lambda: nullcontext(replace(parts, retriever=retriever, settings=settings)))


def test_a_long_list_is_embedded_in_pieces(client: TestClient, parts: Parts) -> None:
    texts = [f"{number} boil an egg " * (1 + 100 * (number % 3 == 0)) for number in range(40)]
    assert [text for piece in tokens.pieces(texts) for text in piece] == texts
    assert all(len(piece) == 1 or sum(map(len, piece)) <= 2048 for piece in tokens.pieces(texts))
    found = client.post("/v1/embeddings", json={"input": texts}).json()
    expected = parts.retriever.embedder.embed(texts)
    assert np.array([one["embedding"] for one in found["data"]]) == pytest.approx(expected)
    assert [one["index"] for one in found["data"]] == list(range(40))
    assert found["usage"]["total_tokens"] == sum(len(parts.engine.tokenizer.encode(text)) for text in texts)


@pytest.mark.parametrize("holding", [15.0], indirect=True)
def test_more_embeddings_than_may_wait_are_a_503_and_queries_go_on(holding: FastAPI, held: Held, live: Live) -> None:
    with live(holding) as url, ThreadPoolExecutor(service.desk.PLACES) as pool:
        asked = [
            pool.submit(httpx.post, f"{url}/v1/embeddings", json={"input": "x"}, timeout=30)
            for _ in range(service.desk.PLACES)
        ]
        desk = holding.state.embeddings_desk
        wait_for(lambda: desk._taken == service.desk.PLACES)
        refused = httpx.post(f"{url}/v1/embeddings", json={"input": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "8 calls for embeddings" in refused.json()["error"]["message"]
        body = {"query": "x", "task": "sql", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/query", json=body).status_code == 200
        assert httpx.post(f"{url}/tokenize", json={"prompt": "x"}).status_code == 200
        held.go.release(10_000)
        assert {one.result().status_code for one in asked} <= {200, 504}
        wait_for(lambda: not desk._taken)


def test_embeddings_that_take_too_long_are_a_504_and_stop(holding: FastAPI, held: Held, live: Live) -> None:
    with live(holding) as url:
        answer = httpx.post(f"{url}/v1/embeddings", json={"input": ["y" * 3000] * 9}, timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        held.go.release(10_000)
        time.sleep(0.05)
        assert len(held.pieces) == 1


def test_a_client_that_goes_ends_its_embeddings(holding: FastAPI, held: Held, live: Live) -> None:
    with live(holding) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        body = json.dumps({"input": ["y" * 3000] * 9})
        connection.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
        wait_for(lambda: held.pieces)
        connection.close()
        wait_for(lambda: not holding.state.embeddings_desk._taken, 0.9)  # well before its time is over
        held.go.release(10_000)
        time.sleep(0.05)
        assert len(held.pieces) == 1


@pytest.mark.parametrize(
    ("path", "body", "param", "most"),
    [
        ("/v1/embeddings", {"input": ["x" * 2**17] * 3}, "input", tokens.MOST_EMBEDDED),
        ("/tokenize", {"prompt": "x" * (2**20 + 1)}, "prompt", tokens.MOST_TOKENIZED),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "x" * (2**20 + 1)}]},
            "messages",
            tokens.MOST_TOKENIZED,
        ),
        ("/detokenize", {"tokens": [1] * (2**18 + 1)}, "tokens", tokens.MOST_TOKENS),
    ],
)
def test_too_much_for_one_call_is_refused(
    client: TestClient, path: str, body: dict[str, Any], param: str, most: int
) -> None:
    answer = client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], str(most) in error["message"]) == (400, param, True)


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})])
def test_the_service_answers_while_tokens_are_made(
    app: FastAPI, live: Live, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(*_args: object, **_options: object) -> str:
        begun.set()
        go.wait(5)
        return ""

    monkeypatch.setattr(Tokenizer, "encode", slow)
    monkeypatch.setattr(Tokenizer, "decode", slow)
    with live(app) as url, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{url}{path}", json=body, timeout=30)
        assert begun.wait(5)
        assert httpx.get(f"{url}/healthz", timeout=2).status_code == 200
        assert not asked.done()
        go.set()
        assert asked.result().status_code == 200
