"""Experts that are paged in before anybody asks, without harm to those who run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.requests import FinishedEvent, GenerationRequest, Sampling
from service.app import create_app
from service.keys import KeyRing, make_key
from service.parts import Parts
from store.records import Selection

PREFETCH = "/v1/residency/prefetch"
EGG = {"query": "how long do I boil an egg", "max_tokens": 2}


def test_after_a_prefetch_the_first_query_reads_nothing(client: TestClient, parts: Parts) -> None:
    client.delete("/v1/residency")
    found = client.post(PREFETCH, json={"task": "cooking"}).json()
    assert (found["task"], found["keep"], found["experts_paged"]) == ("cooking", 0.5, found["experts"])
    assert found["bytes_paged"] > 0
    shown = client.get("/v1/residency").json()
    assert (shown["resident"], shown["leased"]) == (found["experts"], 0)
    receipt = client.post("/v1/query", json=EGG).json()["receipt"]
    assert (receipt["experts_paged"], receipt["selection"] is not None) == (0, True)
    again = client.post(PREFETCH, json={"task": "cooking", "keep": 0.25, "scorer": "tcess"}).json()
    assert (again["keep"], again["selection"]) == (0.25, "cooking-tcess-0.25")


def test_it_counts_as_no_query(client: TestClient, parts: Parts) -> None:
    before, decisions = client.get("/metrics").text, parts.store.decisions.list(1)
    client.post(PREFETCH, json={"task": "cooking"})

    def queries(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith(("moepager_requests_total", "moepager_tokens"))]

    assert queries(client.get("/metrics").text) == queries(before)
    assert parts.store.decisions.list(1) == decisions


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"task": "zzz"}, 404, "not_found"),
        ({"task": "stranger"}, 409, "mismatch"),
        ({"task": "unproven"}, 400, "no_evidence"),
        ({"task": "cooking", "keep": 0.3}, 400, "no_evidence"),
        ({"task": "cooking", "keep": 1.0}, 422, "budget_too_small"),
        ({"task": "cooking", "experts": 3}, 400, "invalid_request"),
        ({}, 400, "invalid_request"),
    ],
)
def test_what_no_query_could_have_is_refused(client: TestClient, body: dict[str, Any], status: int, code: str) -> None:
    answer = client.post(PREFETCH, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_it_never_waits_for_those_who_run_nor_takes_their_experts(
    client: TestClient, parts: Parts, selection_named: Callable[[str], Selection]
) -> None:
    """One runs on half of the experts, which is all that the budget holds: another task has no room until it ends."""
    client.delete("/v1/residency")
    selection = selection_named("cooking-reap-0.5")
    request = GenerationRequest((65, 66), selection, "mask", Sampling(max_tokens=150, ignore_eos=True))
    alone = _answer(parts, request)
    begun, answers = threading.Event(), list[Any]()

    def run() -> None:
        for event in parts.worker.submit(replace(request, cancelled=threading.Event())):
            begun.set()
            answers.append(event)

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait(30)
    refused = client.post(PREFETCH, json={"task": "sql"})
    same = client.post(PREFETCH, json={"task": "cooking"})
    still = thread.is_alive()
    thread.join()
    assert still, "the answer ended too soon for this test"
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert "do not fit beside" in refused.json()["error"]["message"]
    assert (same.status_code, same.json()["experts_paged"]) == (200, 0)
    assert answers[-1].text == alone.text
    assert client.post(PREFETCH, json={"task": "sql"}).status_code == 200


def _answer(parts: Parts, request: GenerationRequest) -> FinishedEvent:
    *_, last = parts.worker.submit(replace(request, cancelled=threading.Event()))
    assert isinstance(last, FinishedEvent)
    return last


def test_it_is_for_operators(parts: Parts) -> None:
    key, secret = make_key("k", "query", None)
    app = create_app(lambda: nullcontext(replace(parts, keys=KeyRing([key]))))
    with TestClient(app, headers={"authorization": f"Bearer {secret}"}) as client:
        while client.get("/readyz").status_code == 503:
            pass
        for method, path in (("POST", PREFETCH), ("POST", "/v1/drain"), ("DELETE", "/v1/drain"), ("GET", "/v1/drain")):
            assert client.request(method, path, json={"task": "cooking"}).status_code == 403, path
