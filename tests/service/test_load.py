"""A public load generator, locust, against a live server and a real engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from fastapi import FastAPI

from service.parts import Parts


def test_locust_finds_no_failure_and_the_service_is_idle_afterwards(
    app: FastAPI, parts: Parts, live: Callable[[FastAPI], AbstractContextManager[str]], tmp_path: Path
) -> None:
    """Six users at once, who check their answers, on four rows; then nothing is leased, queued or running."""
    file = Path(__file__).parent / "load" / "locustfile.py"
    with live(app) as url:
        ended = subprocess.run(
            [sys.executable, "-m", "locust", "-f", str(file), "--headless", "-u", "6", "-r", "6", "-t", "4s",
             "--host", url, "--json"],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout + ended.stderr  # 1 where anything failed
        found = {row["name"]: row for row in json.loads(ended.stdout)}
        assert set(found) == {"whole", "several", "streamed"}
        assert all(row["num_requests"] > 0 and row["num_failures"] == 0 for row in found.values()), found
    assert (parts.worker.waiting, parts.worker.running) == (0, 0)
    assert parts.engine.residency().leased == 0
