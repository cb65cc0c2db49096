"""Tokens and embeddings over HTTP, against the tokenizer and the embedder themselves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from service.parts import Parts


def test_text_becomes_the_models_tokens_and_text_again(client: TestClient, parts: Parts) -> None:
    found = client.post("/tokenize", json={"model": "tiny", "prompt": "boil an egg"}).json()
    assert found["tokens"] == list(parts.engine.tokenizer.encode("boil an egg"))
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), parts.max_context)
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "boil an egg"}
    assert client.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


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
