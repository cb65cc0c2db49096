"""A real service that is told to stop with answers under way: some are finished in their grace, the rest are told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from waiting import wait_for

EGG = "how long do I boil an egg"
Events = Callable[[str], list[tuple[str, Any]]]

# A token takes a fifth of a second.
PROGRAM = """
import sys, time
from engine.generate import Batch
from service import cli

step = Batch.step
def slow(self):
    time.sleep(0.2)
    return step(self)
Batch.step = slow
sys.argv = ["moepager", "serve", "--port=0", "--embedder=hash", "--max-context=256", *sys.argv[1:]]
cli.main()
"""


@contextmanager
def slow_service(model: Path, store: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", PROGRAM, f"--model={model}", f"--store={store}", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            url = next(line.split()[2].rstrip(";") for line in process.stdout if line.startswith("Listening on "))
            wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 200)
            yield process, url
        finally:
            process.kill()


class Asked:
    """A streamed query in a thread of its own."""

    def __init__(self, url: str, tokens: int) -> None:
        self.body, self.failure = "", ""
        self._url, self._tokens = url, tokens
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        wait_for(lambda: "event: token" in self.body or self.failure)

    def _read(self) -> None:
        body = {"query": EGG, "stream": True, "max_tokens": self._tokens, "ignore_eos": True}
        try:
            with httpx.stream("POST", f"{self._url}/v1/query", json=body, timeout=120) as answer:
                for text in answer.iter_text():
                    self.body += text
        except httpx.TransportError as error:
            self.failure = repr(error)

    def ended(self) -> str:
        self._thread.join(60)
        return self.body


@pytest.mark.slow
def test_a_service_told_to_stop_finishes_what_it_can_and_says_the_rest(
    model_folder: Path, store_url: str, events_of: Events
) -> None:
    with slow_service(model_folder, store_url, "--grace-seconds=8") as (process, url):
        long, short = Asked(url, 200), Asked(url, 6)
        assert (long.failure, short.failure) == ("", "")
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 503)
        assert httpx.get(f"{url}/healthz").status_code == 200
        refused = httpx.post(f"{url}/v1/query", json={"query": EGG})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy")
        assert "is stopping" in refused.json()["error"]["message"]
        for name, value in {"retry-after": "1", "connection": "close", "x-frame-options": "DENY"}.items():
            assert refused.headers[name] == value
        assert events_of(short.ended())[-1][0] == "done"
        name, told = events_of(long.ended())[-1]
        assert (name, told["error"]["code"]) == ("error", "busy")
        assert "before the service stopped" in told["error"]["message"]
        assert (long.failure, short.failure) == ("", "")  # both bodies were whole
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_second_signal_ends_a_service_at_once(model_folder: Path, store_url: str) -> None:
    with slow_service(model_folder, store_url, "--grace-seconds=500") as (process, url):
        asked = Asked(url, 200)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == -signal.SIGTERM
        asked.ended()
        assert asked.failure  # it was cut off


@pytest.mark.parametrize("scripted_app", [60.0], indirect=True)
def test_a_drained_service_finishes_its_answers_takes_no_new_ones_and_comes_back(
    scripted_app: Any, worker: Any, live: Callable[[Any], Any]
) -> None:
    worker.text, worker.delay = "a" * 18, 0.05
    with live(scripted_app) as url:
        asked = Asked(url, 18)
        own = {"host": socket.gethostname(), "pid": os.getpid()}  # behind a balancer: whom of several it was
        assert httpx.post(f"{url}/v1/drain").json() == {"draining": True, "under_way": 1, "process": own}
        assert "moepager_drained 1.0" in httpx.get(f"{url}/metrics").text
        for method, path in (("GET", "/readyz"), ("POST", "/v1/query"), ("POST", "/v1/jobs"), ("POST", "/tokenize")):
            refused = httpx.request(method, f"{url}{path}", json={"query": EGG} if method == "POST" else None)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "busy"), path
            assert refused.headers["retry-after"] == "1"
            assert "is drained" in refused.json()["error"]["message"]
        for path in ("/healthz", "/metrics", "/v1/models", "/console/"):
            assert httpx.get(f"{url}{path}").status_code == 200, path
        assert httpx.get(f"{url}/v1/session").json()["draining"] is True
        assert "event: done" in asked.ended()
        wait_for(lambda: httpx.get(f"{url}/v1/drain").json()["under_way"] == 0)
        assert httpx.delete(f"{url}/v1/drain").json() == {"draining": False, "under_way": 0, "process": own}
        assert "moepager_drained 0.0" in httpx.get(f"{url}/metrics").text
        assert httpx.get(f"{url}/readyz").status_code == 200
        worker.text = "b"
        assert httpx.post(f"{url}/v1/query", json={"query": EGG}).json()["answer"] == "b"
