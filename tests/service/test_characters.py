"""Text that is no text, in any field: refused by its field's name, by every route, and never a 500."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

HALF, WHOLE = "\ud83e", "\U0001f95a"  # an egg's first UTF-16 unit, and the egg
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def chat(text: str = "boil an egg", **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 2, **fields}


def tool(text: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "description": text}}


BODIES: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, chat(f"boil {HALF}"), "messages[0].content"),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "text", "text": HALF}]}]),
     "messages[0].content[0].text"),
    (CHAT, chat(metadata={"chat_id": HALF}), "metadata.chat_id"),
    (CHAT, chat(tools=[tool(HALF)]), "tools[0].function.description"),
    (CHAT, chat(stop=HALF), "stop"),
    (CHAT, chat(**{f"odd{HALF}": 1}), "body"),
    (CHAT, chat(metadata={HALF: 1}), "metadata"),
    ("/v1/completions", {"model": "tiny", "prompt": f"a{HALF}"}, "prompt"),
    ("/v1/completions", {"model": "tiny", "prompt": ["a", HALF]}, "prompt[1]"),
    ("/v1/query", {"query": HALF}, "query"),
    ("/v1/tasks", {"name": "t", "exemplars": ["a", HALF]}, "exemplars[1]"),
    ("/v1/embeddings", {"input": HALF}, "input"),
    ("/tokenize", {"prompt": HALF}, "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "field"), BODIES, ids=[f"{path} {field}" for path, _, field in BODIES])
def test_half_a_character_is_refused_by_its_field(
    client: TestClient, path: str, body: dict[str, Any], field: str
) -> None:
    answer = client.post(path, content=json.dumps(body), headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert "half of a character" in error["message"]


@pytest.mark.parametrize("written", ["utf-8", "utf-16", "utf-32"])
def test_neither_does_it_get_through_unescaped(client: TestClient, written: str) -> None:
    raw = json.dumps(chat(HALF), ensure_ascii=False).encode(written, "surrogatepass")
    answer = client.post(CHAT, content=raw, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0].content")


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("written", ["utf-8", "utf-16"])
def test_whole_characters_are_text(client: TestClient, written: str, escaped: bool) -> None:
    raw = json.dumps(chat(f"boil an egg {WHOLE}"), ensure_ascii=escaped).encode(written)
    assert client.post(CHAT, content=raw, headers=JSON).status_code == 200


def test_what_only_looks_like_an_escape_is_text(client: TestClient) -> None:
    assert client.post(CHAT, json=chat(r"boil an egg \ud83e")).status_code == 200


def test_a_body_that_nobody_reads_may_be_anything(client: TestClient) -> None:
    for body in (r'{"a": "\ud83e', r'"\ud83e' + "[" * 100_000):
        assert client.post("/v1/tasks/reload", content=body, headers=JSON).status_code == 200
