"""`moepager demo`, as a new user runs it: offline job, server, one query a task over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo.tasks.registry import TASKS
from engine.card import ModelCard
from store.home import bundled_model


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_task_is_found_answered_and_served_from_just_its_experts(tmp_path: Path) -> None:
    environment = os.environ | {"MOEPAGER_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "service", "demo", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    queries = json.loads(done.stdout.splitlines()[-1])["queries"]
    card = ModelCard.read(bundled_model())
    assert [query["task"] for query in queries] == [task.name for task in TASKS]
    for query in queries:
        receipt = query["receipt"]
        assert query["retrieved"] == query["task"]
        assert query["answer"].strip()
        assert receipt["mode"] == "mask"
        assert receipt["keep"] == 0.25
        assert receipt["experts"] == receipt["experts_paged"] <= card.layers * card.experts // 4
        assert receipt["bytes_paged"] == receipt["experts"] * card.expert_bytes
        assert 0.5 < receipt["coverage"] <= 1
    right = sum(query["answer"].strip() == query["expected"] for query in queries)
    assert right >= 8, [(query["expected"], query["answer"]) for query in queries]
