"""A text that is too long is refused before anything is done with it, and nothing of it stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.text import Tokenizer
from service.discovery import MOST_KEPT
from service.parts import Parts
from service.retrieval import MOST_READ, Retriever
from store.unmatched import UnmatchedQueries

LONG = "who won the cup " * 100  # more tokens than the context holds
HOPELESS = "x" * 2**17


def bodies(text: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        ("/v1/query", {"query": text}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"model": "tiny", "prompt": text}),
    ]


@pytest.mark.parametrize(("path", "body"), bodies(LONG))
def test_what_the_context_cannot_hold_is_refused_before_it_is_retrieved(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(Retriever, "decide", _never)
    monkeypatch.setattr(UnmatchedQueries, "add", _never)
    answer = client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == next(name for name in ("query", "messages", "prompt") if name in body)


@pytest.mark.parametrize(("path", "body"), bodies(HOPELESS))
def test_what_no_context_could_hold_is_refused_before_it_is_turned_into_tokens(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", _never)
    monkeypatch.setattr(Tokenizer, "encode_chat", _never)
    answer = client.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert str(2**17) in error["message"]
    assert str(2**16) in error["message"]


def test_the_beginning_of_a_query_is_embedded(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    embed = parts.retriever.embedder.embed
    monkeypatch.setattr(parts.retriever.embedder, "embed", lambda texts: seen.extend(texts) or embed(texts))
    parts.retriever.decide(" " * MOST_READ + "boil an egg " * MOST_READ)
    assert [len(text) for text in seen] == [MOST_READ]
    assert seen[0].startswith("boil")


def test_the_beginning_of_a_query_is_kept_without_what_is_private(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    monkeypatch.setattr(UnmatchedQueries, "add", lambda _self, text, *_: kept.append(text))
    monkeypatch.setattr(parts.discovery, "_limit", 10)
    text = "z" * (MOST_KEPT - 4) + " someone@example.org " + "z" * 10_000
    unknown = replace(parts.retriever.decide("boil an egg"), task=None)
    parts.discovery.asked(text, unknown)
    assert len(kept[0]) == MOST_KEPT
    assert "someone" not in kept[0]
    assert "@" not in kept[0]


def _never(*_: object, **__: object) -> Any:
    pytest.fail("it should have been refused before")
