"""`POST /v1/query` on a real engine: answers, receipts, streams."""

from __future__ import annotations

from fastapi.testclient import TestClient

from service.parts import Parts


def test_a_query_is_answered_from_its_tasks_selection(client: TestClient, parts: Parts) -> None:
    answer = client.post("/v1/query", json={"query": "how long do I boil an egg", "max_tokens": 8}).json()
    assert answer["task"] == "cooking"
    print(answer)
