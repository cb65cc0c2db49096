"""How answers end when they do not end well: timeouts, failures, full queues, clients that hang up."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import service.merging
from engine.engine import Engine
from store.errors import Busy, CheckpointError, Conflict, MoepagerError, TimedOut

EGG = "how long do I boil an egg"
Events = Callable[[str], list[tuple[str, Any]]]
Live = Callable[[FastAPI], AbstractContextManager[str]]

QUERY = ("/v1/query", {"query": EGG})
CHAT = ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": EGG}]})
COMPLETION = ("/v1/completions", {"model": "tiny", "prompt": [EGG, EGG]})
ROUTES = [QUERY, CHAT, COMPLETION]


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_an_answer_that_takes_too_long_is_a_504_and_is_cancelled(
    scripted: TestClient, worker: Any, path: str, body: dict[str, Any]
) -> None:
    worker.delay = 5.0
    answer = scripted.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert all(stream.request.cancelled.is_set() for stream in worker.streams)


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_stream_that_takes_too_long_ends_in_an_error_frame(
    scripted: TestClient, worker: Any, events_of: Events, path: str, body: dict[str, Any]
) -> None:
    worker.text, worker.delay = "abcdefgh", 0.4
    answer = scripted.post(path, json={**body, "stream": True})
    last = events_of(answer.text)[-1][1]
    assert (answer.status_code, last["error"]["code"]) == (200, "timeout")
    assert "[DONE]" not in answer.text
    assert all(stream.request.cancelled.is_set() for stream in worker.streams)


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize(
    ("failure", "status", "code", "words"),
    [
        (CheckpointError("The file is gone."), 422, "bad_checkpoint", "The file is gone."),
        (RuntimeError("secret path"), 500, "internal_error", "its log has the details"),
    ],
)
def test_a_failure_of_the_engine_is_told_in_either_form(
    scripted_app: FastAPI,
    worker: Any,
    events_of: Events,
    path: str,
    body: dict[str, Any],
    failure: Exception,
    status: int,
    code: str,
    words: str,
) -> None:
    worker.failure = failure
    with TestClient(scripted_app, raise_server_exceptions=False) as client:
        while client.get("/readyz").status_code == 503:
            pass
        plain = client.post(path, json=body)
        streamed = events_of(client.post(path, json={**body, "stream": True}).text)
    assert plain.status_code == status
    for error in (plain.json()["error"], streamed[-1][1]["error"]):
        assert error["code"] == code
        assert words in error["message"]
        assert "secret" not in error["message"]
    assert len(streamed) > 1  # tokens came before


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_503_with_a_time_to_come_back(
    scripted: TestClient, worker: Any, path: str, body: dict[str, Any], stream: bool
) -> None:
    worker.room = 0
    answer = scripted.post(path, json={**body, "stream": stream})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["type"] == "server_error"


def test_of_prompts_that_fit_the_queue_only_in_part_none_is_queued(scripted: TestClient, worker: Any) -> None:
    worker.room = 1
    assert scripted.post("/v1/completions", json=COMPLETION[1]).status_code == 503
    assert not worker.streams


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_silent_stream_sends_comments(
    scripted: TestClient, worker: Any, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(service.merging, "PING_SECONDS", 0.02)
    worker.text, worker.delay = "a", 0.1
    assert "\n\n: waiting" in "\n\n" + scripted.post(path, json={**body, "stream": True}).text


def test_comments_tell_how_far_the_paging_has_come(
    scripted: TestClient, worker: Any, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each state once, until the first token; a client that skips comments, as all do, sees the plain stream."""
    monkeypatch.setattr(service.merging, "GLANCE_SECONDS", 0.004)
    here = iter([0, 5, 5, 11, 12, *[12] * 1000])
    monkeypatch.setattr(service.running, "_in_memory", lambda _parts, _selection: next(here))
    worker.text, worker.delay = "a", 0.7
    body = {"model": "tiny:cooking", "messages": [{"role": "user", "content": "x"}], "stream": True}
    text = scripted.post("/v1/chat/completions", json=body).text
    comments = [line for line in text.splitlines() if line.startswith(":")]
    assert comments == [*(f": waiting: {count} of 12 experts are in memory" for count in (0, 5, 11)), ": waiting"]
    assert text.index(comments[-1]) < text.index("data: ")
    assert text.endswith("data: [DONE]\n\n")


def test_what_is_in_memory_is_looked_up_in_the_bank(parts: Any, selection_named: Any) -> None:
    selection = selection_named("cooking-reap-0.5")
    parts.worker.run(lambda engine: engine.evict()).result()
    assert service.running._in_memory(parts, selection) == 0

    def count(engine: Engine) -> int:
        with engine.lease(selection):
            return service.running._in_memory(parts, selection)

    assert parts.worker.run(count).result() == len(selection)


@pytest.mark.parametrize("error", [(Busy("full"), "true"), (TimedOut("late"), "false"), (Conflict("held"), "false")])
def test_openais_clients_are_told_whether_to_try_again(
    scripted: TestClient, worker: Any, monkeypatch: pytest.MonkeyPatch, error: tuple[MoepagerError, str]
) -> None:
    def refuse(_requests: object) -> None:
        raise error[0]

    monkeypatch.setattr(worker, "submit_all", refuse)
    answer = scripted.post("/v1/query", json={"query": "x", "task": "sql"})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (error[0].status, error[1])


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_the_generation(
    scripted_app: FastAPI, live: Live, worker: Any, path: str, body: dict[str, Any], stream: bool
) -> None:
    worker.text, worker.delay = "x" * 1000, 0.005
    with live(scripted_app) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.request("POST", path, json.dumps({**body, "stream": stream}), {"content-type": "application/json"})
        if stream:
            assert connection.getresponse().read(10)
        while not worker.streams:
            time.sleep(0.005)
        started = time.monotonic()
        connection.sock.close() if connection.sock else None
        connection.close()
        for one in worker.streams:
            assert one.request.cancelled.wait(0.8)
        assert time.monotonic() - started < 0.8  # well before the request's own timeout


def test_a_client_that_hangs_up_frees_the_real_engine(app: FastAPI, live: Live, parts: Any) -> None:
    with live(app) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        body = {"query": EGG, "stream": True, "max_tokens": 200}
        connection.request("POST", "/v1/query", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.read(10)
        response.close()
        connection.close()
        deadline = time.monotonic() + 5
        while parts.worker.running or parts.engine.residency().leased:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    parts.engine.bank.residency.check()


def test_many_at_once_get_what_each_gets_alone(client: TestClient, parts: Any) -> None:
    """Tasks, modes, sizes and seeds mixed, from many threads: no answer knows of another."""
    texts = [EGG, "select rows from orders", "who won the cup final yesterday"]
    wishes: list[dict[str, Any]] = [{}, {"mode": "exact"}, {"temperature": 0.8, "seed": 3}]
    bodies = [{"query": text, "max_tokens": 6 + n, **wish} for text in texts for n, wish in enumerate(wishes)]
    alone = [client.post("/v1/query", json=body).json()["answer"] for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda body: client.post("/v1/query", json=body).json()["answer"], bodies * 3))
    assert together == alone * 3
    parts.worker.run(lambda engine: None).result(5)  # the last batch is over, its leases ended
    parts.engine.bank.residency.check()
    assert parts.engine.residency().leased == 0
