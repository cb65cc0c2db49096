"""STUN's clusters against its greedy algorithm, on the examples worked out by hand and on random lines."""

from __future__ import annotations

import numpy as np
import pytest

from profiler.clusters import absorbed_at, heights


def on_a_line(*places: float) -> np.ndarray:
    return np.abs(np.subtract.outer(places, places))


def survivors(distances: np.ndarray, threshold: float) -> int:
    """How many clusters there are while the threshold is this high."""
    return int((heights(distances, np.ones(len(distances))) >= threshold).sum())


def merges(distances: np.ndarray, threshold: float, a: set[int], b: set[int]) -> bool:
    """STUN's rule, read literally."""
    return any(
        all(distances[j, m] < threshold for m in a) and all(distances[i, m] < threshold for m in b)
        for i in a
        for j in b
    )


def slow_heights(distances: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """Raise the threshold from one distance to the next and merge whatever may merge."""
    clusters = [{e} for e in range(len(distances))]
    absorbed = np.full(len(distances), np.inf)
    levels = np.unique(distances)
    for level in levels:
        threshold = np.nextafter(level, np.inf)
        while pair := next(
            ((a, b) for a in clusters for b in clusters if a is not b and merges(distances, threshold, a, b)), None
        ):
            kept = [max(sorted(c), key=lambda e: worth[e] if np.isinf(absorbed[e]) else -1) for c in pair]
            absorbed[min(kept, key=lambda e: (worth[e], -e))] = level
            clusters = [c for c in clusters if c not in pair] + [pair[0] | pair[1]]
    return absorbed


@pytest.mark.parametrize(("threshold", "count"), [(1.0, 2), (0.05, 4), (10.0, 1)])
def test_two_pairs_on_a_line_cluster_as_worked_out_by_hand(threshold, count):
    assert survivors(on_a_line(0, 0.1, 3, 3.1), threshold) == count


def test_a_chain_is_not_one_cluster():
    """Single linkage would join 0, 1 and 2.1 at 1.5; 2.1 is farther than that from 0."""
    assert survivors(on_a_line(0, 1, 2.1), 1.5) == 2


@pytest.mark.parametrize("seed", range(6))
def test_the_heights_are_those_of_raising_the_threshold_step_by_step(seed):
    """Lines of distinct distances, where no two merges are possible at once."""
    draw = np.random.default_rng(seed)
    places = np.sort(draw.random(7)) * 10
    worth = draw.random(7)
    np.testing.assert_allclose(heights(on_a_line(*places), worth), slow_heights(on_a_line(*places), worth))


def test_the_busier_of_two_stays_and_the_unused_go_first():
    distances = on_a_line(0, 0.1, 3, 3.1, 9)[None]
    worth = np.array([[1.0, 2, 5, 4, 7]])
    scores = absorbed_at(distances, worth, np.array([[True, True, True, True, False]]))
    assert scores[0, 4] == 0
    assert np.argsort(-scores[0], kind="stable").tolist() == [2, 1, 0, 3, 4]
    assert (absorbed_at(distances, worth, np.zeros((1, 5), bool)) == 0).all()
    assert absorbed_at(distances, worth, np.eye(5, dtype=bool)[:1]).tolist() == [[1.0, 0, 0, 0, 0]]
