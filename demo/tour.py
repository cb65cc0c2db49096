"""The online half of the demo: a real server in a process of its own, one query a task over HTTP, and the answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from demo.corpus import read_pairs
from demo.prepare import DTYPE, THREADS
from demo.tasks.registry import TASKS
from store.errors import MoepagerError

START_SECONDS = 120
# A service for one person: what the cache of a longer conversation would take goes to experts.
MAX_CONTEXT, MAX_BATCH = 128, 4
# A service for one person: what the cache of a longer conversation would take goes to experts.
MAX_CONTEXT, MAX_BATCH = 128, 4


@dataclass(frozen=True, slots=True)
class Shown:
    """One query and its answer; `expected` is what the data says."""

    task: str
    query: str
    retrieved: str | None
    expected: str
    answer: str
    receipt: dict[str, Any]


def tour(store_url: str, memory: int, log: Path) -> Iterator[Shown]:
    """Asks a fresh service the first test query of every task; each finds no experts of other tasks in its way."""
    with serving(store_url, memory, log) as client:
        for task in TASKS:
            pair = read_pairs(task.name, "test")[0]
            client.delete("/v1/residency").raise_for_status()
            reply = client.post("/v1/query", json={"query": pair.prompt})
            if reply.is_error:
                raise MoepagerError(f"The service refused the {task.name} query: {reply.json()['error']['message']}")
            body = reply.json()
            yield Shown(task.name, pair.prompt, body["task"], pair.response, body["answer"], body["receipt"])


@contextmanager
def serving(
    store_url: str, memory: int, log: Path, program: Sequence[str] = ("-m", "service"), options: Sequence[str] = ()
) -> Iterator[httpx.Client]:
    """`moepager serve` on a free port of 127.0.0.1, with a client for it; ended when the block is left. `program` is
    what Python runs in the command's place."""
    port = _free_port()
    limits = ["--max-context", str(MAX_CONTEXT), "--max-batch", str(MAX_BATCH), "--memory", str(memory)]
    limits += ["--dtype", DTYPE, "--threads", str(THREADS), *options]
    command = [sys.executable, *program, "serve", "--store", store_url, "--port", str(port), *limits]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=_environment())  # noqa: S603 - our own command
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                _wait_until_ready(client, server, log)
                yield client
        finally:
            server.terminate()
            server.wait(30)


def _wait_until_ready(client: httpx.Client, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise MoepagerError(f"The service ended with exit code {server.returncode}:\n{log.read_text()}")
        try:
            if client.get("/readyz").is_success:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.1)
    raise MoepagerError(f"The service was not ready within {START_SECONDS} seconds:\n{log.read_text()}")


def _environment() -> dict[str, str]:
    """Without MOEPAGER_* settings of the user's: the demo is the same everywhere."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("MOEPAGER_") or name == "MOEPAGER_HOME"
    }
    return kept | {"OMP_WAIT_POLICY": "PASSIVE"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
