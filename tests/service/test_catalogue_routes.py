"""What can be asked without generating: models, tasks, retrieval, residency, health, and what every answer has."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient

from service.parts import Parts


def test_the_base_model_comes_first_then_one_for_each_task(client: TestClient, parts: Parts) -> None:
    found = client.get("/v1/models").json()
    assert found["object"] == "list"
    assert [model["id"] for model in found["data"]] == ["tiny", "tiny:cooking", "tiny:sql", "tiny:unproven"]
    base, task = found["data"][:2]
    assert (base["root"], base["parent"], base["owned_by"]) == (parts.folder.name, None, "moepager")
    assert "/" not in json.dumps(base)  # tenants need not know where it lies
    assert (task["parent"], task["max_model_len"]) == ("tiny", 256)
    assert isinstance(base["created"], int)


@pytest.mark.parametrize("name", ["tiny", "tiny:sql"])
def test_a_model_is_found_by_its_id(client: TestClient, name: str) -> None:
    listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert client.get(f"/v1/models/{name}").json() == listed[name]


@pytest.mark.parametrize(
    ("name", "code"), [("other", "model_not_found"), ("a/b", "model_not_found"), ("tiny:no", "model_not_found")]
)
def test_an_unknown_model_is_not_found(client: TestClient, name: str, code: str) -> None:
    answer = client.get(f"/v1/models/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)


def test_retrieval_ranks_the_tasks_and_stores_its_decision(client: TestClient, parts: Parts) -> None:
    answer = client.post("/v1/retrieve", json={"query": "how long do I boil an egg"}, headers={"x-request-id": "r-1"})
    found = answer.json()
    assert (found["id"], found["task"], found["reason"]) == ("r-1", "cooking", "retrieved")
    assert [one["task"] for one in found["ranked"]] == ["cooking", "sql"]
    near, far = (one["similarity"] for one in found["ranked"])
    assert found["similarity"] == near > parts.retriever.threshold > far
    assert found["threshold"] == parts.retriever.threshold
    [last] = parts.store.decisions.list(1)
    assert (last.request, last.task) == ("r-1", "cooking")


def test_retrieval_of_a_strange_query_says_how_near_it_came(client: TestClient) -> None:
    found = client.post("/v1/retrieve", json={"query": "who won the cup final yesterday"}).json()
    assert (found["task"], found["reason"]) == (None, "below-threshold")
    assert found["nearest"] == found["ranked"][0]["task"]


@pytest.mark.parametrize("body", [{}, {"query": " "}, {"query": "x", "top": 3}])
def test_a_bad_retrieval_is_refused(client: TestClient, body: dict[str, object]) -> None:
    assert client.post("/v1/retrieve", json=body).status_code == 400


def test_tasks_show_the_evidence_of_each_size(client: TestClient, parts: Parts, doubt: str) -> None:
    found = client.get("/v1/tasks").json()
    tasks = {task["task"]: task for task in found["tasks"]}
    assert list(tasks) == ["cooking", "sql", "unproven"]
    cooking = tasks["cooking"]
    assert (cooking["serves"], cooking["refusal"], cooking["profile_id"]) == ("cooking-reap-0.5", None, "p-cooking")
    assert {(e["scorer"], e["keep"]) for e in cooking["evidence"]} == {
        (scorer, keep) for scorer in ("frequency", "random", "reap", "tcess") for keep in (1.0, 0.5, 0.25)
    }
    half = next(e for e in cooking["evidence"] if e["selection"] == "cooking-reap-0.5")
    assert (half["experts"], half["bytes"], half["fits"]) == (12, 12 * parts.engine.plan.slot_bytes, True)
    assert half["retention"] == half["accuracy"] == pytest.approx(0.9 * 0.85)
    assert not any(e["fits"] for e in cooking["evidence"] if e["keep"] == 1.0)
    assert (cooking["doubts"], tasks["sql"]["doubts"]) == ([], [doubt])
    figures = {"tokens_per_expert": 50.0, "unseen": 0.125, "skew": 9.0, "least_skew": 3.0, "agreement": 0.9}
    figures |= {"surprise": None}
    assert cooking["trust"] == tasks["sql"]["trust"] == figures
    assert tasks["unproven"]["serves"] is None
    assert "no stored evaluation" in tasks["unproven"]["refusal"]


def test_residency_says_what_the_device_holds(client: TestClient, parts: Parts) -> None:
    client.post("/v1/query", json={"query": "boil an egg", "task": "cooking", "max_tokens": 1})
    parts.worker.run(lambda engine: None).result(5)  # the batch, whose last event came before its leases ended, is over
    found = client.get("/v1/residency").json()
    assert found["slots"] == parts.engine.plan.slots
    assert found["budget"] == parts.settings.memory
    assert found["resident"] == sum(found["per_layer"]) <= found["slots"]
    assert found["resident_bytes"] == found["resident"] * found["slot_bytes"]
    assert found["leased"] == 0


def test_residency_can_be_given_up_and_is_paged_in_again(client: TestClient, parts: Parts) -> None:
    ask = {"query": "boil an egg", "task": "cooking", "max_tokens": 1}
    client.post("/v1/query", json=ask)
    held = client.get("/v1/residency").json()["resident"]
    assert client.delete("/v1/residency").json()["evicted"] == held
    assert client.get("/v1/residency").json()["resident"] == 0
    receipt = client.post("/v1/query", json=ask).json()["receipt"]
    assert receipt["experts_paged"] == receipt["experts"] == 12
    assert receipt["bytes_paged"] == 12 * parts.engine.card.expert_bytes


def test_a_request_id_is_echoed_or_made(client: TestClient) -> None:
    assert client.get("/healthz", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    made = client.get("/healthz").headers["x-request-id"]
    assert len(made) == 32
    refused = client.post("/v1/query", json={}, headers={"x-request-id": "mine-8"})
    assert refused.headers["x-request-id"] == "mine-8"


def test_an_unprintable_request_id_is_replaced(client: TestClient) -> None:
    answer = client.get("/healthz", headers={"x-request-id": b"a\tb"})
    assert answer.headers["x-request-id"] != "a\tb"


def test_a_body_beyond_all_bounds_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/query", json={"query": "x" * 9_000_000})
    assert answer.status_code == 413
    message = answer.json()["error"]["message"]
    assert "8388608 bytes" in message
    assert "/docs" not in message  # no other route takes more


def test_health_and_readiness(client: TestClient) -> None:
    assert client.get("/healthz").json() == client.get("/health").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready", "model": "tiny"}


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/query", 405)])
def test_routes_that_do_not_exist_answer_in_openais_shape(
    client: TestClient, method: str, path: str, status: int
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert path in answer.json()["error"]["message"]
