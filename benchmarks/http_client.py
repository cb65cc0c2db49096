"""A client of the service in a process of its own: what it computes must not take the interpreter from the service.

It reads one JSON object a line, does what it says, and answers with one: `{"ask": body}` sends a chat and says how long
that took; `{"clients": n, "seconds": s, "bodies": [...]}` lets n clients ask for so long and counts tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any

import httpx

ROUTE = "/v1/chat/completions"
TIMEOUT = 60


class HttpClient:
    """This process's end of it."""

    def __init__(self, orders: IO[str], answers: IO[str]) -> None:
        self._orders, self._answers = orders, answers

    def ask(self, body: dict[str, Any]) -> tuple[float, float]:
        """Seconds that the answer took, and seconds of processor time that the client spent on it."""
        said = self._told({"ask": body})
        return said["seconds"], said["cpu"]

    def tokens_per_second(self, clients: int, seconds: float, bodies: Sequence[dict[str, Any]]) -> float:
        rate: float = self._told({"clients": clients, "seconds": seconds, "bodies": list(bodies)})["rate"]
        return rate

    def _told(self, order: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(order), file=self._orders, flush=True)
        said: dict[str, Any] = json.loads(self._answers.readline() or '{"error": "the client ended"}')
        if "error" in said:
            raise RuntimeError(f"A client did not get the answer that it asked for: {said['error']}")
        return said


@contextmanager
def client_of(url: str) -> Iterator[HttpClient]:
    command = [sys.executable, "-m", "benchmarks.http_client", url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("The client's pipes are not there.")
        with process.stdin as orders:  # it ends with its orders
            yield HttpClient(orders, process.stdout)


def obey(url: str) -> None:
    with httpx.Client(base_url=url, timeout=TIMEOUT) as client:
        for line in sys.stdin:
            order = json.loads(line)
            said: dict[str, Any]
            try:
                said = _timed(client, order["ask"]) if "ask" in order else _rate(url, **order)
            except Exception as error:  # whatever it is, the benchmark has to stop and say it
                said = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(said), flush=True)


def _timed(client: httpx.Client, body: dict[str, Any]) -> dict[str, float]:
    began, worked = time.perf_counter(), time.process_time()
    _ask(client, body)
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - worked}


def _ask(client: httpx.Client, body: dict[str, Any]) -> None:
    answer = client.post(ROUTE, json=body)
    if answer.status_code != 200:
        raise RuntimeError(answer.text)
    if body["stream"]:
        whole = answer.text.endswith("data: [DONE]\n\n")
    else:
        whole = answer.json()["usage"]["completion_tokens"] == body["max_tokens"]
    if not whole:
        raise RuntimeError(answer.text)


def _rate(url: str, clients: int, seconds: float, bodies: Sequence[dict[str, Any]]) -> dict[str, float]:
    until = time.perf_counter() + seconds

    def work(number: int) -> int:
        tokens = 0
        with httpx.Client(base_url=url, timeout=TIMEOUT) as client:
            while time.perf_counter() < until:
                body = bodies[(number + tokens) % len(bodies)]
                _ask(client, body)
                tokens += body["max_tokens"]
        return tokens

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(work, range(clients)))
    return {"rate": tokens / (time.perf_counter() - began)}


if __name__ == "__main__":
    obey(sys.argv[1])
