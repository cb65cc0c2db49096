"""Faults of the disk and of clients as they look over HTTP, on the real engine: whoever is concerned hears of it."""

from __future__ import annotations

import errno
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from engine import reader
from engine.engine import Engine
from service.draining import CUT_OFF
from service.parts import Parts

EGG = "how long do I boil an egg"
ROWS = "select rows from orders"
Live = Callable[[FastAPI], AbstractContextManager[str]]
Events = Callable[[str], list[tuple[str, Any]]]


@pytest.fixture
def gate(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is resident; no read comes back while the gate is closed."""
    gate, real = threading.Event(), os.preadv

    def held(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        gate.wait(20)
        return real(descriptor, buffers, offset)

    gate.set()
    parts.worker.run(Engine.evict).result(10)
    monkeypatch.setattr(reader.os, "preadv", held)
    yield gate
    gate.set()


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_while_its_experts_are_read_leaves_nothing_behind(
    app: FastAPI, live: Live, parts: Parts, gate: threading.Event, stream: bool
) -> None:
    gate.clear()
    with live(app) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        body = json.dumps({"query": EGG, "stream": stream, "max_tokens": 50})
        connection.request("POST", "/v1/query", body, {"content-type": "application/json"})
        _wait_for(lambda: parts.engine.residency().leased > 0)
        connection.close()
        _wait_for(lambda: parts.engine.residency().leased == 0 and not parts.worker.running)  # the gate is still closed
        gate.set()
        assert httpx.post(f"{url}/v1/query", json={"query": EGG, "max_tokens": 2}, timeout=20).status_code == 200
    parts.worker.run(lambda engine: engine.bank.residency.check()).result(10)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["queued", "prefill", "decoding"])
def test_a_client_that_hangs_up_in_any_other_phase_leaves_nothing_behind(
    app: FastAPI, live: Live, parts: Parts, monkeypatch: pytest.MonkeyPatch, phase: str, stream: bool
) -> None:
    """Whatever it waits for goes on only after it has gone: a place, its prompt's pass, or one of its tokens."""
    gate, reached, passes, real = threading.Event(), threading.Event(), [0], parts.engine.passes.step

    def step(*args: Any) -> Any:
        passes[0] += 1
        if passes[0] == (1 if phase == "prefill" else 3):
            reached.set()
            gate.wait(20)
        return real(*args)

    monkeypatch.setattr(parts.engine.passes, "step", step)
    before = set(parts.streams)
    if phase == "queued":
        parts.worker.run(lambda _: (reached.set(), gate.wait(20)))
    with live(app) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        body = json.dumps({"query": EGG, "stream": stream, "max_tokens": 50, "ignore_eos": True})
        connection.request("POST", "/v1/query", body, {"content-type": "application/json"})
        assert reached.wait(10)
        _wait_for(lambda: bool(set(parts.streams) - before))
        [asked] = set(parts.streams) - before
        connection.close()
        assert asked.request.cancelled.wait(10)  # while what it waited for is still held
        gate.set()
        _wait_for(lambda: not parts.worker.waiting and not parts.worker.running)
    assert passes[0] <= {"queued": 0, "prefill": 2, "decoding": 3}[phase]
    assert parts.worker.run(lambda engine: engine.residency().leased).result(10) == 0
    parts.worker.run(lambda engine: engine.bank.residency.check()).result(10)


def test_a_failed_read_is_told_in_either_form_and_the_next_request_is_right(
    client: TestClient, parts: Parts, events_of: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    body = {"query": EGG, "max_tokens": 4}
    right = client.post("/v1/query", json=body).json()["answer"]
    parts.worker.run(Engine.evict).result(10)
    monkeypatch.setattr(reader.os, "preadv", fail)
    plain = client.post("/v1/query", json=body)
    streamed = events_of(client.post("/v1/query", json={**body, "stream": True}).text)[-1][1]
    monkeypatch.undo()
    assert (plain.status_code, plain.json()["error"]["code"]) == (503, "disk_error")
    assert plain.headers["retry-after"], "clients try it again by themselves"
    for error in (plain.json()["error"], streamed["error"]):
        assert "Input/output error" in error["message"]
    assert client.post("/v1/query", json=body).json()["answer"] == right
    assert parts.worker.run(lambda engine: engine.residency().leased).result(10) == 0


def test_a_disk_that_stalls_is_told_to_its_own_request_in_either_form_while_others_are_answered(
    client: TestClient, parts: Parts, gate: threading.Event, events_of: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cooking` and `sql` fit beside one another at a quarter of the experts."""
    egg, rows = ({"query": query, "keep": 0.25, "max_tokens": 4} for query in (EGG, ROWS))
    right = {query["query"]: client.post("/v1/query", json=query).json()["answer"] for query in (egg, rows)}
    parts.worker.run(Engine.evict).result(10)
    assert client.post("/v1/query", json=egg).status_code == 200  # its experts are in memory
    monkeypatch.setattr(parts.engine._reader, "_patience", 2.0)
    gate.clear()
    with ThreadPoolExecutor(1) as pool:
        stalled = pool.submit(client.post, "/v1/query", json=rows)
        _wait_for(lambda: bool(parts.engine.bank.residency.unfilled))
        beside = client.post("/v1/query", json=egg)
        assert not stalled.done()  # it waits for the disk still
        refused = stalled.result(20)
    monkeypatch.setattr(parts.engine._reader, "_patience", 0.1)
    streamed = events_of(client.post("/v1/query", json={**rows, "stream": True}).text)[-1][1]
    gate.set()
    assert (beside.status_code, beside.json()["answer"]) == (200, right[EGG])
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "disk_error")
    assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("1", "true")
    for error in (refused.json()["error"], streamed["error"]):
        assert (error["code"], error["message"][:15]) == ("disk_error", "The disk stalls")
    assert client.post("/v1/query", json=rows).json()["answer"] == right[ROWS]
    assert parts.worker.run(lambda engine: engine.residency().leased).result(10) == 0


def test_a_weight_file_that_changed_is_nobodys_wrong_request_and_not_to_be_tried_again(
    client: TestClient, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = client.post("/v1/query", json={"query": EGG, "max_tokens": 2}).json()["answer"]
    parts.worker.run(Engine.evict).result(10)
    [file] = parts.engine._reader._files.values()
    monkeypatch.setattr(file, "_identity", replace(file._identity, written=5 * 10**9))
    refused = client.post("/v1/query", json={"query": EGG, "max_tokens": 2})
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "checkpoint_changed")
    assert (refused.headers["x-should-retry"], "retry-after" in refused.headers) == ("false", False)
    assert "its time of writing was 1970-01-01 00:00:05" in refused.json()["error"]["message"]
    monkeypatch.undo()
    assert client.post("/v1/query", json={"query": EGG, "max_tokens": 2}).json()["answer"] == right


PROGRAM = """
import os, sys, time
from engine import reader
from service.server import run_server
from service.settings import load_settings

real = os.preadv
def slow(*args):
    if os.path.exists(sys.argv[3]):  # once the service is ready
        os.write(1, b"reading\\n")
        time.sleep(float(sys.argv[5]))
    return real(*args)
reader.os.preadv = slow
names = {"model": sys.argv[1], "store": sys.argv[2], "grace_seconds": float(sys.argv[4])}
run_server(load_settings(**names, embedder="hash", max_context=256, port=0))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("grace", "read"), [(10, 0.3), (0.3, 2)])
def test_sigterm_in_mid_swap_stops_the_service_in_order(
    model_folder: Path, store_url: str, tmp_path: Path, grace: float, read: float
) -> None:
    """A swap that ends within the grace is answered, one that takes longer is cut off in words."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    told = [str(model_folder), store_url, str(tmp_path / "slow"), str(grace), str(read)]
    command = [sys.executable, "-c", PROGRAM, *told]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        url = next(line.split()[2].rstrip(";") for line in process.stdout if line.startswith("Listening on "))
        while httpx.get(f"{url}/readyz").status_code != 200:
            time.sleep(0.05)
        right = _ask(url)
        assert right[0] == 200
        assert httpx.delete(f"{url}/v1/residency").status_code == 200
        (tmp_path / "slow").touch()
        outcomes: list[tuple[int, str]] = []
        asking = threading.Thread(target=lambda: outcomes.append(_ask(url)))
        asking.start()
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        asking.join(20)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert outcomes == [right if grace == 10 else (503, CUT_OFF)]


def _ask(url: str) -> tuple[int, str]:
    answer = httpx.post(f"{url}/v1/query", json={"query": ROWS, "max_tokens": 2}, timeout=60)
    return answer.status_code, answer.json().get("answer") or answer.json()["error"]["message"]
