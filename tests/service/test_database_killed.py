"""A real PostgreSQL killed and frozen under a real service: nothing is lost, nobody waits for ever, all goes on by
itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from waiting import wait_for

from store.database import open_store

EGG = "how long do I boil an egg"
QUERY = {"query": EGG, "max_tokens": 2}
PATIENCE = 60.0  # seconds in which a frozen database must not hold anybody; the bounds say 13


@pytest.fixture
def url(mortal_postgres: Any, stock: Callable[[str], None]) -> str:
    found = str(mortal_postgres.empty())
    stock(found)
    return found


@pytest.fixture
def service(url: str, model_folder: Path, tmp_path: Path) -> Iterator[httpx.Client]:
    with served(url, model_folder, tmp_path) as client:
        yield client


@contextmanager
def served(url: str, model: Path, home: Path) -> Iterator[httpx.Client]:
    env = {**os.environ, "MOEPAGER_HOME": str(home), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "service", "serve", "--port=0", f"--model={model}", f"--store={url}"]
    words += ["--embedder=hash", "--max-context=256", "--reload-seconds=0.2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            address = next(line.split()[2].rstrip(";") for line in process.stdout if line.startswith("Listening on "))
            with httpx.Client(base_url=address, timeout=PATIENCE) as client:
                wait_for(lambda: client.get("/readyz").status_code == 200)
                yield client
        finally:
            process.kill()


def refused(answer: httpx.Response) -> bool:
    found = (answer.status_code, answer.headers.get("retry-after"), answer.json().get("error", {}).get("code"))
    return found == (503, "1", "store_unreachable")


def body_of(number: int) -> dict[str, Any]:
    items = [{"prompt": f"plant number {n} " * 8, "response": f"in month {n}"} for n in range(number)]
    return {"name": "garden", "calibration": items, "evaluation": [{"prompt": "sow", "response": "now"}]}


@pytest.mark.slow
def test_a_service_outlives_its_database(mortal_postgres: Any, service: httpx.Client, url: str) -> None:
    assert service.post("/v1/query", json=QUERY).status_code == 200
    mortal_postgres.kill()
    answer = service.post("/v1/query", json=QUERY)
    assert refused(answer)
    assert "could not be written to the audit" in answer.json()["error"]["message"]
    task: Any = {"json": {**body_of(1), "name": "pots"}, "headers": {"idempotency-key": "once"}}
    assert refused(service.post("/v1/tasks", **task))
    assert wait_for(lambda: refused(service.get("/readyz")))
    assert service.get("/healthz").status_code == 200
    mortal_postgres.start()
    wait_for(lambda: service.get("/readyz").status_code == 200)
    assert service.post("/v1/query", json=QUERY).json()["receipt"]["task"] == "cooking"
    assert [service.post("/v1/tasks", **task).status_code for _ in range(2)] == [201, 201]
    with open_store(url) as store:
        assert [task.name for task in store.tasks.list()].count("pots") == 1
        assert len(store.decisions.list()) == 2  # one for each query that was answered


@pytest.mark.slow
def test_a_frozen_database_holds_nobody_for_ever(mortal_postgres: Any, service: httpx.Client) -> None:
    assert service.post("/v1/query", json=QUERY).status_code == 200
    mortal_postgres.signal(signal.SIGSTOP)
    try:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{service.base_url}/v1/query", json=QUERY, timeout=PATIENCE))

        threads = [threading.Thread(target=ask) for _ in range(20)]  # more than there are threads and connections
        for thread in threads:
            thread.start()
        assert wait_for(lambda: refused(service.get("/readyz")))
        for thread in threads:
            thread.join()
        assert service.get("/healthz").status_code == 200
        assert [refused(answer) for answer in answers] == [True] * 20
    finally:
        mortal_postgres.signal(signal.SIGCONT)
    wait_for(lambda: service.get("/readyz").status_code == 200)
    assert service.post("/v1/query", json=QUERY).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("away", [0.0, 3.0])
def test_a_job_whose_database_is_killed_is_finished_once(
    mortal_postgres: Any, service: httpx.Client, url: str, away: float
) -> None:
    """Away for a moment, the profiling itself may meet it or not; for longer, whoever runs it notices."""
    assert service.post("/v1/tasks", json=body_of(300)).status_code == 201
    job = service.post("/v1/jobs", json={"task": "garden"}).json()["id"]
    wait_for(lambda: service.get(f"/v1/jobs/{job}").json()["detail"].startswith(("calibrate", "evaluate")))
    mortal_postgres.kill()
    time.sleep(away)
    mortal_postgres.start()
    states = []

    def ended() -> bool:
        answer = service.get(f"/v1/jobs/{job}")
        if answer.status_code == 200:
            states.append(answer.json()["state"])
        return bool(states) and states[-1] in ("done", "failed", "cancelled")

    wait_for(ended, 300)
    assert states[-1] == "done"
    with open_store(url) as store:
        assert len([profile for profile in store.profiles.list() if profile.task == "garden"]) == 1
