"""What is counted, and the line that is logged for every query."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from engine.requests import GenerationRequest
from engine.worker import TokenStream
from service.access_log import JsonLines
from service.app import create_app
from service.metrics import CONTENT_TYPE, Metrics
from service.parts import Parts, reread
from store.errors import StoreUnreachable
from store.records import JobTally

EGG = {"query": "how long do I boil an egg", "max_tokens": 4}
FIELDS = (
    "time key duration_ms queue_ms code query_id task similarity mode experts_paged bytes_paged swap_ms ttft_ms "
    "tokens outcome"
)


@pytest.fixture
def counted(parts: Parts) -> Iterator[TestClient]:
    """A service whose counts begin at zero."""
    with TestClient(
        create_app(lambda: nullcontext(replace(parts, metrics=Metrics(parts.engine, parts.worker))))
    ) as client:
        while client.get("/readyz").status_code == 503:
            pass
        yield client


def samples(client: TestClient) -> dict[tuple[str, str], float]:
    """Values by name and labels, written as `mode=mask task=cooking`."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == CONTENT_TYPE
    return {
        (one.name, " ".join(f"{k}={v}" for k, v in sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(answer.text)
        for one in family.samples
    }


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(one.message) for one in caplog.records if one.name == "moepager.access"]


def test_a_query_is_counted_with_what_it_cost(counted: TestClient, parts: Parts) -> None:
    counted.delete("/v1/residency")
    receipt = counted.post("/v1/query", json=EGG).json()["receipt"]
    found = samples(counted)
    of_task = "mode=mask task=cooking"
    assert found["moepager_requests_total", "mode=mask outcome=length task=cooking"] == 1
    assert found["moepager_ttft_seconds_count", of_task] == found["moepager_tpot_seconds_count", of_task] == 1
    assert found["moepager_ttft_seconds_sum", of_task] == pytest.approx(receipt["ttft_ms"] / 1000)
    assert found["moepager_bytes_paged_total", of_task] == receipt["bytes_paged"] > 0
    assert found["moepager_swaps_total", of_task] == found["moepager_swap_seconds_count", of_task] == 1
    assert found["moepager_expert_misses_total", "task=cooking"] == receipt["experts_paged"] == receipt["experts"]
    assert found["moepager_coverage_sum", "task=cooking"] == pytest.approx(receipt["coverage"])
    assert found["moepager_tokens_total", "kind=completion"] == 4
    assert found["moepager_tokens_total", "kind=prompt"] == receipt["prompt_tokens"]
    assert found["moepager_slots", ""] == parts.engine.plan.slots
    assert found["moepager_slots_resident", ""] == receipt["experts_paged"]
    assert found["moepager_hit_rate", ""] == 0
    counted.post("/v1/query", json=EGG)
    found = samples(counted)
    assert found["moepager_hit_rate", ""] == 0.5
    assert found["moepager_expert_hits_total", "task=cooking"] == receipt["experts"]
    assert found["moepager_swaps_total", of_task] == 1
    assert (found["moepager_queue_length", "task=cooking"], found["moepager_running", ""]) == (0, 0)


def test_tasks_in_service_count_from_zero_so_that_their_first_event_shows_in_a_rate(parts: Parts) -> None:
    """A count that appears with its first event has no rate at all: the cold swap and the alarm would never show."""
    fresh = Metrics(parts.engine, parts.worker)
    reread(replace(parts, metrics=fresh))
    for told in (fresh.text(), parts.metrics.text()):  # read again, and as they were opened
        lines = told.decode().splitlines()
        assert any(line.startswith('moepager_drift_total{task="cooking"}') for line in lines)
        for task in ("cooking", "none"):
            assert any(line.startswith(f'moepager_queue_length{{task="{task}"}}') for line in lines)
            assert any(line.startswith(f'moepager_swaps_total{{mode="mask",task="{task}"}}') for line in lines)
            assert any(line.startswith(f'moepager_bytes_paged_total{{mode="exact",task="{task}"}}') for line in lines)
            assert any(line.startswith(f'moepager_escalations_total{{at="answer",task="{task}"}}') for line in lines)
            assert any(line.startswith(f'moepager_expert_misses_total{{task="{task}"}}') for line in lines)
            assert any(line.startswith(f'moepager_exact_misses_total{{task="{task}"}}') for line in lines)
    from_zero = fresh.text().decode().splitlines()  # the other one may have counted what tests before this one did
    assert {'moepager_drift_total{task="cooking"} 0.0', "moepager_hit_rate NaN"} <= set(from_zero)


def test_queries_of_no_task_and_refusals_are_counted(counted: TestClient) -> None:
    counted.post("/v1/query", json={"query": "who won the cup final yesterday", "max_tokens": 2})
    counted.post("/v1/query", json={"query": ""})
    found = samples(counted)
    assert found["moepager_abstentions_total", ""] == 1
    assert found["moepager_requests_total", "mode=exact outcome=length task=none"] == 1
    assert (found["moepager_responses_total", "status=200"], found["moepager_responses_total", "status=400"]) == (1, 1)
    assert ("moepager_hit_rate", "") in found  # NaN: no selection was leased


def test_every_query_logs_one_line_of_json(counted: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moepager.access")
    answer = counted.post("/v1/query", json=EGG, headers={"x-request-id": "q-1"}).json()
    [line] = lines(caplog)
    assert set(FIELDS.split()) <= set(line)
    receipt = answer["receipt"]
    for name in ("task", "similarity", "mode", "experts_paged", "bytes_paged", "swap_ms", "ttft_ms", "coverage"):
        assert line[name] == receipt[name], name
    assert (line["query_id"], line["tokens"], line["outcome"]) == ("q-1", 4, "length")


def test_a_query_that_takes_too_long_is_counted_and_logged_once(
    scripted: TestClient, worker: Any, parts: Parts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "moepager.access")
    worker.delay = 10.0
    assert scripted.post("/v1/query", json=EGG).status_code == 504
    time.sleep(0.05)
    [line] = lines(caplog)
    assert (line["outcome"], line["tokens"], line["ttft_ms"]) == ("timeout", None, None)
    assert b'outcome="timeout"' in parts.metrics.text()


def test_a_query_whose_engine_fails_is_counted_and_logged_once(
    scripted_app: Any, worker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "moepager.access")
    worker.failure = RuntimeError("no")
    with TestClient(scripted_app, raise_server_exceptions=False) as client:
        while client.get("/readyz").status_code == 503:
            pass
        assert client.post("/v1/query", json=EGG).status_code == 500
    assert [line["outcome"] for line in lines(caplog)] == ["error"]


def test_a_query_that_is_refused_is_counted_and_logged_once(
    counted: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "moepager.access")
    long = {"query": "boil " * 1000}
    assert counted.post("/v1/query", json=long, headers={"x-request-id": "q-2"}).status_code == 400
    [line] = lines(caplog)
    assert set(FIELDS.split()) <= set(line)
    assert (line["query_id"], line["outcome"], line["code"]) == ("q-2", "refused", "context_length_exceeded")
    assert line["duration_ms"] > 0
    assert samples(counted)["moepager_requests_total", "mode=none outcome=refused task=none"] == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/query", EGG),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": 2}),
        ("/v1/completions", {"model": "tiny", "prompt": ["x", "y"]}),
    ],
)
def test_a_query_that_finds_the_queue_full_is_counted_and_logged_once(
    scripted: TestClient, worker: Any, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, Any]
) -> None:
    caplog.set_level(logging.INFO, "moepager.access")
    worker.room = 0
    before = samples(scripted).get(("moepager_requests_total", "mode=none outcome=busy task=none"), 0)
    assert scripted.post(path, json=body).status_code == 503
    assert [(line["outcome"], line["code"]) for line in lines(caplog)] == [("busy", "busy")]
    assert samples(scripted)["moepager_requests_total", "mode=none outcome=busy task=none"] == before + 1


def test_whatever_is_logged_is_a_line_of_json() -> None:
    try:
        raise ValueError("odd\nthing")
    except ValueError:
        record = logging.LogRecord("uvicorn.error", logging.WARNING, "", 1, "it %s", ("broke\noff",), sys.exc_info())
    [text] = JsonLines().format(record).splitlines()
    line = json.loads(text)
    assert (line["level"], line["logger"], line["message"]) == ("warning", "uvicorn.error", "it broke\noff")
    assert "ValueError: odd" in line["exception"]
    assert line["time"].endswith("+00:00")


def test_every_metric_that_the_dashboard_names_exists(counted: TestClient) -> None:
    counted.delete("/v1/residency")
    counted.post("/v1/query", json=EGG)
    there = {name for name, _ in samples(counted)} | set(
        re.findall(r"^# TYPE (\w+)", counted.get("/metrics").text, re.M)
    )
    board = json.loads((Path(__file__).parents[2] / "deploy" / "grafana-dashboard.json").read_text())
    named = {n for p in board["panels"] for t in p["targets"] for n in re.findall(r"moepager_\w+", t["expr"])}
    assert len(named) > 12
    assert named <= there, named - there
    families = {re.sub(r"_(total|bucket|sum|count|created)$", "", name) for name in there if name.startswith("moe")}
    shown = {re.sub(r"_(total|bucket)$", "", name) for name in named}
    assert families == shown, families ^ shown


def test_metrics_of_two_services_do_not_add_up(parts: Parts) -> None:
    first, second = (Metrics(parts.engine, parts.worker) for _ in range(2))
    first.abstained()
    counts = [one.registry.get_sample_value("moepager_abstentions_total") for one in (first, second)]
    assert counts == [1, 0]


def test_the_queue_is_counted_by_task(parts: Parts, counted: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(parts.engine, parts.worker)
    streams = [TokenStream(GenerationRequest((1,), None, "exact")) for _ in range(3)]
    for stream, task in zip(streams, ("sql", "sql", None), strict=True):
        metrics.submitted(stream, task)
    monkeypatch.setattr(type(parts.worker), "queued", lambda _: streams)
    waiting = {
        task: metrics.registry.get_sample_value("moepager_queue_length", {"task": task}) for task in ("sql", "none")
    }
    assert waiting == {"sql": 2, "none": 1}
    monkeypatch.setattr(type(parts.worker), "queued", lambda _: [])
    assert metrics.registry.get_sample_value("moepager_queue_length", {"task": "sql"}) == 0


def test_what_exact_mode_reads_is_counted_and_so_is_the_process(counted: TestClient, parts: Parts) -> None:
    counted.delete("/v1/residency")
    before = samples(counted)
    receipt = counted.post("/v1/query", json={**EGG, "mode": "exact"}).json()["receipt"]
    after = samples(counted)
    experts = after["moepager_experts_paged_total", ""] - before["moepager_experts_paged_total", ""]
    read = after["moepager_read_bytes_total", ""] - before["moepager_read_bytes_total", ""]
    assert experts == receipt["experts_paged"] > 0
    assert read >= receipt["bytes_paged"] > 0  # what lies between experts, too
    card = parts.engine.card
    tokens = receipt["prompt_tokens"] + receipt["completion_tokens"] - 1
    for name, count in (("choices", tokens * card.layers * card.top_k), ("misses", receipt["experts_paged"])):
        key = (f"moepager_exact_{name}_total", f"task={receipt['task']}")
        assert after[key] - before.get(key, 0) == count
    assert after["process_resident_memory_bytes", ""] > 0


def test_jobs_are_counted_and_metrics_are_told_without_them_while_the_store_is_away(
    counted: TestClient, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"queued": 2, "running": 1, "done": 7, "failed": 0, "cancelled": 0}
    monkeypatch.setattr(type(parts.store.jobs), "tally", lambda _, model: JobTally(states, 12.5))  # type: ignore[arg-type]
    found = samples(counted)
    assert {state: found["moepager_jobs", f"state={state}"] for state in states} == states
    assert found["moepager_jobs_oldest_seconds", ""] == 12.5

    def away(*_: object) -> None:
        raise StoreUnreachable("gone")

    monkeypatch.setattr(type(parts.store.jobs), "tally", away)
    found = samples(counted)
    assert not [name for name, _ in found if name.startswith("moepager_jobs")]
    assert found["moepager_slots", ""] > 0
