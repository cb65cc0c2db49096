"""`moepager demo`, as a new user runs it: offline job, server, one query a task over HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from demo.tasks.registry import TASKS
from engine.card import ModelCard
from store.home import bundled_model


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_task_is_found_answered_and_served_from_just_its_experts(demo_run: dict[str, Any]) -> None:
    queries = demo_run["queries"]
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
