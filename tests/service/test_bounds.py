"""A request that will not wait for a long swap is refused before it waits."""

from __future__ import annotations

from typing import Any

from fastapi.testclient import TestClient

EGG = {"query": "how long do I boil an egg", "task": "cooking", "max_tokens": 2}


def chat(**expert: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "messages": [{"role": "user", "content": "how long do I boil an egg"}],
        "max_tokens": 2,
        "expert": {"task": "cooking", **expert},
    }


def test_a_swap_that_is_predicted_to_be_longer_is_a_503_with_the_numbers(client: TestClient) -> None:
    client.delete("/v1/residency")
    refused = client.post("/v1/query", json={**EGG, "max_swap_ms": 0})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "swap_too_long"
    assert "`max_swap_ms` is 0" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"]
    assert client.post("/v1/query", json={**EGG, "max_swap_ms": 1e9}).status_code == 200
    answer = client.post("/v1/query", json={**EGG, "max_swap_ms": 0})  # all of them are here now
    assert answer.status_code == 200
    assert answer.json()["receipt"]["experts_paged"] == 0


def test_openais_routes_take_the_bound_in_expert(client: TestClient) -> None:
    model = client.get("/v1/models").json()["data"][0]["id"]
    client.delete("/v1/residency")
    body = {**chat(max_swap_ms=0), "model": model}
    assert client.post("/v1/chat/completions", json=body).status_code == 503
    assert client.post("/v1/chat/completions", json={**body, "model": f"{model}:cooking"}).status_code == 503


def test_exact_mode_can_promise_no_swap(client: TestClient) -> None:
    client.delete("/v1/residency")
    refused = client.post("/v1/query", json={**EGG, "mode": "exact", "max_swap_ms": 5})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "max_swap_ms"
