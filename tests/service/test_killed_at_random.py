"""A real service killed at random moments while it is asked for tasks, jobs and proposals: asked again, each is there
once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from store.database import open_store

SEED = 20261122
ROUNDS = 3
LATEST = 0.15  # seconds after the first request at which the service is killed
TEXTS = [
    f"when do I plant {plant} in the garden"
    for plant in ["beans", "kale", "leeks", "peas", "corn", "mint", "dill", "sage"]
]


def served(model: Path, store: str, home: Path) -> tuple[subprocess.Popen[str], str]:
    words = [sys.executable, "-m", "service", "serve", "--port=0", f"--model={model}", f"--store={store}"]
    words += ["--embedder=hash", "--max-context=256", "--keep-unmatched=100", "--redis=redis://127.0.0.1:1/0"]
    env = {**os.environ, "MOEPAGER_HOME": str(home), "OMP_NUM_THREADS": "1"}  # the jobs wait: no worker comes
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    assert process.stdout is not None
    url = next(line.split()[2].rstrip(";") for line in process.stdout if line.startswith("Listening on "))
    deadline = time.monotonic() + 120
    while httpx.get(f"{url}/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process, url


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def ask_for_all(url: str, number: int, proposal: str) -> list[httpx.Response]:
    """A task, its job, and an acceptance, each under a key of its own."""
    task = {"name": f"task-{number}", "exemplars": [f"question {number}"], "calibration": [{"prompt": "x " * 500}] * 20}
    accept = {"name": f"found-{number}"}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/tasks", task), ("/v1/jobs", {"task": task["name"]}), (f"/v1/proposals/{proposal}/accept", accept)
    ]  # fmt: skip
    return [
        httpx.post(f"{url}{path}", json=body, headers={"idempotency-key": f"{number}-{place}"}, timeout=60)
        for place, (path, body) in enumerate(asked)
    ]


def ask_until_it_dies(url: str, number: int, proposal: str) -> None:
    try:
        ask_for_all(url, number, proposal)
    except httpx.TransportError:
        return


@pytest.mark.slow
def test_whenever_the_service_is_killed_what_is_asked_again_is_there_once(
    model_folder: Path, stock: Callable[[str], None], tmp_path: Path
) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    stock(store)
    rng = random.Random(SEED)
    process, url = served(model_folder, store, tmp_path)
    try:
        for number in range(ROUNDS):
            with open_store(store) as opened:
                for text in TEXTS:
                    opened.unmatched.add(f"{text} {number}", None, 100)
            [found] = httpx.get(f"{url}/v1/proposals", timeout=60).json()["proposals"]
            asking = threading.Thread(target=ask_until_it_dies, args=(url, number, found["id"]))
            asking.start()
            time.sleep(rng.uniform(0, LATEST))
            end(process)
            asking.join()
            process, url = served(model_folder, store, tmp_path)
            answers = ask_for_all(url, number, found["id"])
            assert [answer.status_code for answer in answers] == [201, 202, 202], [one.text for one in answers]
            with open_store(store) as opened:
                opened.check()
                assert opened.unmatched.list() == []
    finally:
        end(process)
    wanted = sorted(f"{kind}-{number}" for kind in ("task", "found") for number in range(ROUNDS))
    with open_store(store) as opened:
        assert sorted(task.name for task in opened.tasks.list() if "-" in task.name) == wanted
        assert sorted(job.task for job in opened.jobs.list()) == wanted
        assert {job.state for job in opened.jobs.list()} == {"queued"}
        assert set(wanted) <= opened.corpora.tasks()
