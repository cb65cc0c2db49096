"""The guard on the bundled model: own queries pass, strange ones are stopped and given the exact answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from demo.prepare import DTYPE, corpus
from demo.tasks.registry import TASKS
from engine.config import EngineConfig
from engine.engine import Engine
from engine.guard import Guard, draw_guard
from engine.requests import FinishedEvent, GenerationRequest, Sampling
from profiler.batches import Encoded, encode_corpus
from service.serving import Candidate, ProfiledTask, best_by_size, read_candidates
from store.database import open_store
from store.records import Selection

OWN, STRANGE = ("french", "chemistry"), ("sql", "music")
ITEMS = 12


def _served(store_url: str, fingerprint: str, task: str, keep: float) -> Candidate:
    with open_store(store_url) as store:
        profile = store.profiles.latest(fingerprint, task, proven=True)
        assert profile is not None
        profiled = ProfiledTask(task, "", profile.id, read_candidates(store, profile))
    return next(found for found in best_by_size(profiled, None) if found.stored.keep == keep)


def _answers(
    engine: Engine, items: list[Encoded], selection: Selection | None, guard: Guard | None = None
) -> list[FinishedEvent]:
    mode: Any = "exact" if selection is None else "mask" if guard is None else "auto"
    requests = [
        GenerationRequest(
            one.prompt, selection, mode, Sampling(max_tokens=len(one.response) + 4), guard=guard, restarts=bool(guard)
        )
        for one in items
    ]
    ends = [event for event in engine.generate(requests) if isinstance(event, FinishedEvent)]
    return sorted(ends, key=lambda end: end.row)


def _right(ends: list[FinishedEvent], items: list[Encoded]) -> float:
    return sum(e.text.strip() == (i.item.response or "").strip() for e, i in zip(ends, items, strict=True)) / len(items)


@pytest.mark.slow
@pytest.mark.usefixtures("demo_run")
def test_own_queries_pass_strange_ones_are_answered_exactly(model: Path, demo_store: str) -> None:
    stopped_own = stopped_strange = 0
    with Engine.open(EngineConfig(model, max_batch=12, max_context=128, dtype=DTYPE, threads=1)) as engine:
        texts = {task.name: encode_corpus(engine, corpus(task.name, "test", ITEMS)) for task in TASKS}
        for task in OWN:
            served = _served(demo_store, engine.card.fingerprint, task, 0.25)
            guard, selection = draw_guard(served.evidence.levels), served.stored.selection
            assert guard is not None
            stopped_own += sum(e.served.escalated is not None for e in _answers(engine, texts[task], selection, guard))
            for strange in STRANGE:
                items = texts[strange]
                auto, exact = (_answers(engine, items, selection, guard), _answers(engine, items, None))
                masked = _answers(engine, items, selection)
                stopped = [end.served.escalated is not None for end in auto]
                stopped_strange += sum(stopped)
                wanted = [e if out else m for e, m, out in zip(exact, masked, stopped, strict=True)]
                assert [end.text for end in auto] == [end.text for end in wanted]
                assert _right(auto, items) > _right(masked, items) + 0.5
    assert stopped_strange >= 0.9 * len(OWN) * len(STRANGE) * ITEMS
    assert stopped_own <= 0.2 * len(OWN) * ITEMS
