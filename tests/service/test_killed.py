"""A real service, killed with a profiling job under way: the job is taken up again and finished once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from waiting import wait_for

from store.database import open_store

ITEMS = 1000
NOT_YET = ("waits for its turn", "starting")


@contextmanager
def served(home: Path, model: Path, store: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    command = [sys.executable, "-m", "service", "serve", "--port=0", f"--model={model}", f"--store={store}"]
    env = {**os.environ, "MOEPAGER_HOME": str(home), "OMP_NUM_THREADS": "1"}
    options = ["--embedder=hash", "--max-context=256"]
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    ) as p:
        try:
            assert p.stdout is not None
            url = next(line.split()[2].rstrip(";") for line in p.stdout if line.startswith("Listening on "))
            with httpx.Client(base_url=url, timeout=30) as client:
                wait_for(lambda: client.get("/readyz").status_code == 200)
                yield p, client
        finally:
            p.kill()


def children_of(pid: int) -> list[int]:
    return [int(one) for file in Path(f"/proc/{pid}/task").glob("*/children") for one in file.read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the child in Linux's /proc")
def test_a_killed_service_leaves_no_process_and_its_job_is_finished_by_the_next(
    tmp_path: Path, model_folder: Path, stock: Callable[[str], None]
) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    stock(store)
    items = [{"prompt": f"plant number {n} " * 8, "response": f"in month {n}"} for n in range(ITEMS)]
    body = {"name": "garden", "calibration": items, "evaluation": [{"prompt": "sow", "response": "now"}]}
    with served(tmp_path, model_folder, store) as (process, client):
        assert client.post("/v1/tasks", json=body).status_code == 201
        job = client.post("/v1/jobs", json={"task": "garden"}).json()["id"]
        told = wait_for(lambda: (d := client.get(f"/v1/jobs/{job}").json()["detail"]) not in NOT_YET and d)
        assert told.startswith("calibrate"), told
        [child] = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(
            lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
        )
    with open_store(store) as opened:
        assert opened.jobs.get(job).state == "running"  # nobody could say otherwise
    with served(tmp_path, model_folder, store) as (_, client):
        found = wait_for(lambda: (j := client.get(f"/v1/jobs/{job}").json())["state"] in ("done", "failed") and j)
        assert (found["state"], found["detail"]) == ("done", "in service"), json.dumps(found)
        wait_for(lambda: "garden" in [task["task"] for task in client.get("/v1/tasks").json()["tasks"]])
    with open_store(store) as opened:
        assert len([profile for profile in opened.profiles.list() if profile.task == "garden"]) == 1
