"""What makes a profile doubtful, on made-up routing."""

from __future__ import annotations

import numpy as np
import pytest

from profiler.doubts import gates, skew
from profiler.statistics import Statistics


def routed(tokens: int, experts: int, top_k: int, weights: np.ndarray, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    counts = np.zeros(experts)
    for _ in range(tokens):
        counts[draw.choice(experts, top_k, replace=False, p=weights / weights.sum())] += 1
    return counts


def made_of(counts: np.ndarray, tokens: int, top_k: int) -> Statistics:
    """Both halves alike."""
    empty = Statistics.zeros(len(counts), counts.shape[1], top_k)
    empty.selected[:, 0] = counts / 2
    empty.tokens[:, 0] = tokens / 2
    return empty


def test_a_uniform_router_is_as_uneven_as_chance():
    found = [skew(routed(400, 16, 4, np.ones(16), seed)[None], 400, 4)[0] for seed in range(40)]
    assert np.mean(found) == pytest.approx(1.0, abs=0.15)


def test_a_router_with_favourites_is_far_from_chance():
    assert skew(routed(400, 16, 4, np.geomspace(1, 30, 16))[None], 400, 4)[0] > 5


def test_where_every_expert_always_runs_there_is_nothing_to_choose():
    assert skew(np.full((2, 4), 10.0), 10, 4).tolist() == [1.0, 1.0]


def test_good_evidence_raises_no_doubt():
    counts = np.stack([routed(400, 16, 4, np.geomspace(1, 30, 16), seed) for seed in (1, 2)])
    found = gates(made_of(counts, 400, 4), 400)
    assert found.agreement == 1.0
    assert found.doubts() == []
    assert found.unseen == 0


def test_little_text_and_routing_like_chance_are_said():
    few = gates(made_of(routed(20, 16, 4, np.ones(16))[None], 20, 4), 20)
    [tokens, chance] = few.doubts()
    assert "fewer than 30: give more calibration text" in tokens
    assert "any selection is about as good as a random one" in chance


def test_halves_that_use_other_experts_are_said():
    statistics = Statistics.zeros(1, 8, 2)
    statistics.selected[0, 0, 0, :4] = 500
    statistics.selected[1, 0, 0, 4:] = 500
    statistics.tokens[:, 0] = 1000
    found = gates(statistics, 2000)
    assert found.agreement == 0
    assert found.doubts()[-1].startswith("Two halves of the text share 0% of the experts that they use most")


def test_a_mean_over_tasks_is_counted_in_the_tokens_that_it_came_from():
    counts = np.stack([routed(400, 16, 4, np.geomspace(1, 30, 16), seed) for seed in (1, 2)])
    whole = made_of(counts, 400, 4)
    assert gates(whole.scaled(1 / 400), 400).tokens_per_expert == pytest.approx(gates(whole, 400).tokens_per_expert)
