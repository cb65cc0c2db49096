"""The figures of `bench retrieve` on vectors whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.retrieval_data import Labelled, RetrievalSet, demo_set
from benchmarks.retrieve import measure, scores_by_task, search_ms_p50
from demo.corpus import read_pairs
from store.records import F32

DATA = RetrievalSet("made", Labelled(("a0", "a1", "b0", "b1"), (0, 0, 1, 1)), Labelled(("a2", "b2"), (0, 1)))


def by_letter(texts: Sequence[str]) -> F32:
    angle = {"a": 0.0, "b": 1.5}
    return np.array(
        [[np.cos(angle[t[0]] + int(t[1]) / 100), np.sin(angle[t[0]] + int(t[1]) / 100)] for t in texts], np.float32
    )


@pytest.mark.parametrize("cosine", [True, False])
def test_separable_tasks_are_found_and_strangers_told_apart(cosine: bool) -> None:
    found = measure(DATA, "made", by_letter, cosine=cosine)
    assert found.accuracy == 1.0
    assert found.abstain_auroc == 1.0
    assert (found.kept, found.abstained) == ((1.0, 1.0) if cosine else (None, None))


def test_a_constant_embedding_finds_nothing() -> None:
    found = measure(DATA, "made", lambda texts: np.ones((len(texts), 2), np.float32) / np.sqrt(2), cosine=True)
    assert found.accuracy == 0.5
    assert found.abstain_auroc == 0.5


def test_scores_equal_a_plain_double_loop() -> None:
    rng = np.random.default_rng(1)
    queries, exemplars = rng.standard_normal((5, 8)).astype(np.float32), rng.standard_normal((12, 8)).astype(np.float32)
    tasks = np.arange(12) % 3
    got = scores_by_task(queries, exemplars, tasks, cosine=False)
    for q in range(5):
        for task in range(3):
            slow = max(
                -float(((queries[q].astype(float) - exemplars[n]) ** 2).sum()) for n in range(12) if tasks[n] == task
            )
            assert got[q, task] == pytest.approx(slow, rel=1e-5)


def test_the_demo_set_asks_in_other_words_than_its_exemplars() -> None:
    data = demo_set()
    assert not set(data.exemplars.texts) & set(data.queries.texts)
    assert len(data.queries.texts) == 100 * (max(data.queries.tasks) + 1)
    assert data.queries.texts[0] == read_pairs("arithmetic", "test")[0].prompt


def test_search_is_timed_at_every_size() -> None:
    assert set(search_ms_p50([10, 100], 16, runs=3)) == {10, 100}
