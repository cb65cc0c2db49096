"""Mode auto over HTTP: who may ask for it, what is answered when the guard stops a query, and what the receipt says.

The stored levels of `cooking` are so low that its guard never stops anything, those of `sql` so high that it always
does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.requests import FinishedEvent
from service.app import create_app
from service.parts import Parts
from service.serving import Policy, Wish, choose_serving
from store.errors import InvalidInput
from store.records import Selection

EGG = "how long do I boil an egg"
ROWS = "select rows from orders"

Generated = Callable[..., FinishedEvent]


def _ask(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/query", json={"max_tokens": 8, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def _tokens(parts: Parts, text: str) -> tuple[int, ...]:
    return parts.engine.tokenizer.encode_chat([{"role": "user", "content": text}])


def test_a_query_that_does_not_stray_is_answered_as_in_mask_mode(
    client: TestClient, parts: Parts, generated: Generated, selection_named: Callable[[str], Selection]
) -> None:
    answer = _ask(client, query=EGG, mode="auto", task="cooking")
    alone = generated(_tokens(parts, EGG), selection_named("cooking-reap-0.5"), max_tokens=8)
    receipt = answer["receipt"]
    assert answer["answer"] == alone.text
    assert (receipt["mode"], receipt["escalated"], receipt["keep"]) == ("auto", None, 0.5)
    assert receipt["guard"] == {"bound": 0.0, "alarm_rate": pytest.approx(1 / 21), "items": 20}
    assert 0 < receipt["level"] < 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_query_that_strays_is_answered_exactly_and_the_receipt_says_so(
    client: TestClient,
    parts: Parts,
    generated: Generated,
    events_of: Callable[[str], list[tuple[str, Any]]],
    *,
    stream: bool,
) -> None:
    body = {"query": ROWS, "mode": "auto", "task": "sql", "max_tokens": 8, "stream": stream}
    found = client.post("/v1/query", json=body)
    answer = events_of(found.text)[-1][1] if stream else found.json()
    alone = generated(_tokens(parts, ROWS), None, max_tokens=8)
    receipt = answer["receipt"]
    assert answer["answer"] == alone.text
    assert receipt["mode"] == "auto"
    assert receipt["experts"] == parts.engine.card.layers * parts.engine.card.experts
    assert receipt["escalated"] == {"at_token": 0, "coverage": receipt["level"], "bound": 1.0}
    assert 0 < receipt["coverage"] < 1
    if not stream:
        assert found.headers["x-expert-escalated"] == "0"
    assert parts.engine.residency().leased == 0


def test_escalations_are_counted_by_task_and_place(client: TestClient, parts: Parts) -> None:
    def counted() -> float:
        lines = parts.metrics.text().decode().splitlines()
        found = [line for line in lines if line.startswith('moepager_escalations_total{at="prompt",task="sql"}')]
        return float(found[0].split()[-1]) if found else 0.0

    before = counted()
    _ask(client, query=ROWS, mode="auto", task="sql")
    _ask(client, query=ROWS, mode="mask", task="sql")
    _ask(client, query=EGG, mode="auto", task="cooking")
    assert counted() == before + 1


def test_auto_of_a_task_with_too_few_evaluated_items_is_refused_with_the_numbers(client: TestClient) -> None:
    refused = client.post("/v1/query", json={"query": EGG, "mode": "auto", "task": "cooking", "scorer": "tcess"})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "no_bound", "mode")
    assert "takes 19 held-out items" in error["message"]
    assert "metered 18" in error["message"]


def test_auto_without_any_evidence_is_refused_as_mask_mode_is(client: TestClient) -> None:
    refused = client.post("/v1/query", json={"query": EGG, "mode": "auto", "task": "unproven"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_evidence")


def test_a_lower_alarm_rate_needs_more_items_and_a_higher_one_raises_the_bound(parts: Parts) -> None:
    stored = parts.catalogue.named("cooking")
    rising = tuple(
        replace(c, evidence=replace(c.evidence, levels=tuple(n / 40 for n in range(40)))) for c in stored.candidates
    )
    catalogue = replace(parts.catalogue, tasks={"cooking": replace(stored, candidates=rising)})
    retrieval = parts.retriever.decide(EGG)

    def bound(rate: float) -> float:
        serving = choose_serving(Wish(mode="auto"), retrieval, catalogue, Policy(parts.policy.plan, alarm_rate=rate))
        assert serving.guard is not None
        return serving.guard.bound

    assert (bound(0.05), bound(0.2)) == (1 / 40, 7 / 40)
    with pytest.raises(InvalidInput, match="takes 99 held-out items"):
        bound(0.01)


@pytest.fixture
def auto_client(parts: Parts) -> Iterator[TestClient]:
    """A service whose own mode is auto."""
    with TestClient(
        create_app(lambda: nullcontext(replace(parts, policy=replace(parts.policy, mode="auto"))))
    ) as opened:
        while opened.get("/readyz").status_code == 503:
            pass
        yield opened


def test_the_services_own_mode_holds_where_a_request_names_none(auto_client: TestClient) -> None:
    assert _ask(auto_client, query=EGG)["receipt"]["mode"] == "auto"
    assert _ask(auto_client, query=EGG, mode="mask")["receipt"]["guard"] is None
    assert _ask(auto_client, query="who won the cup final yesterday")["receipt"]["mode"] == "exact"  # of no task


def test_openais_routes_take_mode_auto_as_well(client: TestClient) -> None:
    messages = [{"role": "user", "content": ROWS}]
    body = {"model": "tiny:sql", "messages": messages, "max_tokens": 4, "expert": {"mode": "auto"}}
    receipt = client.post("/v1/chat/completions", json=body).json()["usage"]["expert"]
    assert receipt["escalated"]["at_token"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_background_request_that_its_guard_stops_swaps_nothing_and_is_not_to_be_sent_again(
    client: TestClient, parts: Parts, events_of: Callable[[str], list[tuple[str, Any]]], *, stream: bool
) -> None:
    body = {"model": "tiny:sql", "messages": [{"role": "user", "content": ROWS}], "max_tokens": 4}
    client.delete("/v1/residency")
    front = client.post("/v1/chat/completions", json=body).json()  # its task's experts are in memory now
    paged = parts.engine.residency().experts_paged
    behind = {**body, "stream": stream, "expert": {"mode": "auto", "priority": "background"}}
    answer = client.post("/v1/chat/completions", json=behind)
    if stream and answer.status_code == 200:
        error = events_of(answer.text)[-1][1]["error"]
    else:
        error = answer.json()["error"]
        assert answer.status_code == 409
        assert (answer.headers["x-should-retry"], "retry-after" in answer.headers) == ("false", False)
    assert error["code"] == "off_task"
    assert "its guard's bound is 1. To finish it exactly, others would be read" in error["message"]
    assert parts.engine.residency().experts_paged == paged
    assert parts.worker.run(lambda engine: engine.residency().leased).result(10) == 0
    masked = {**body, "expert": {"mode": "mask", "priority": "background"}}
    assert client.post("/v1/chat/completions", json=masked).json()["choices"] == front["choices"]


def test_drift_is_watched_in_mode_auto_by_what_the_guard_stopped(
    client: TestClient, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str, float]] = []
    monkeypatch.setattr(parts.discovery._drift, "observe", lambda *words: seen.append(words))
    calm = _ask(client, query=EGG, mode="auto", task="cooking")["receipt"]
    stray = _ask(client, query=ROWS, mode="auto", task="sql")["receipt"]
    _ask(client, query=ROWS, mode="exact", task="sql")
    assert seen == [
        ("cooking", calm["profile_id"], pytest.approx(calm["coverage"])),
        ("sql", stray["profile_id"], pytest.approx(stray["escalated"]["coverage"])),
    ]


def test_a_request_may_name_its_alarm_rate(client: TestClient) -> None:
    guard = _ask(client, query=EGG, mode="auto", task="cooking", alarm_rate=0.25)["receipt"]["guard"]
    assert guard["alarm_rate"] == pytest.approx(5 / 21)
    for options, words in (
        ({"mode": "mask", "alarm_rate": 0.1}, "mode mask has none"),
        ({"alarm_rate": 0.1}, "mode mask has none"),
        ({"mode": "auto", "alarm_rate": 0.01}, "held-out items"),
        ({"mode": "auto", "alarm_rate": 0.6}, "less than or equal to 0.5"),
    ):
        answer = client.post("/v1/query", json={"query": EGG, "task": "cooking", **options})
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
