"""What makes a profile doubtful, on made-up routing."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from profiler.doubts import judge, judged, skew
from profiler.statistics import Statistics
from store.records import Profile, Trust


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
    found = judge(made_of(counts, 400, 4), 400)
    assert found.agreement == 1.0
    assert found.doubts == ()
    assert found.unseen == 0


def test_little_text_and_routing_like_chance_are_said():
    few = judge(made_of(routed(20, 16, 4, np.ones(16))[None], 20, 4), 20)
    [tokens, chance] = few.doubts
    assert tokens.startswith("The text gave an expert 5 tokens on the average, fewer than 30")
    assert "any selection is about as good as a random one" in chance


def test_experts_that_a_task_has_no_use_for_are_no_sign_of_little_text():
    """Four of sixteen carry all; the median expert got nothing."""
    found = judge(made_of(np.array([[300.0] * 4 + [0.0] * 12]), 300, 4), 300)
    assert (found.tokens_per_expert, found.unseen, found.doubts) == (75, 0.75, ())


def test_halves_that_use_other_experts_are_said():
    statistics = Statistics.zeros(1, 8, 2)
    statistics.selected[0, 0, 0, :4] = 500
    statistics.selected[1, 0, 0, 4:] = 500
    statistics.tokens[:, 0] = 1000
    found = judge(statistics, 2000)
    assert found.agreement == 0
    assert found.doubts[-1].startswith("Two halves of the text share 0% of the experts that they use most")


def test_a_mean_over_tasks_is_counted_in_the_tokens_that_it_came_from():
    counts = np.stack([routed(400, 16, 4, np.geomspace(1, 30, 16), seed) for seed in (1, 2)])
    whole = made_of(counts, 400, 4)
    assert judge(whole.scaled(1 / 400), 400).tokens_per_expert == pytest.approx(judge(whole, 400).tokens_per_expert)


def profile_of(task: str, statistics: Statistics, trust: Trust | None = None) -> Profile:
    return Profile(
        task, "m", task, statistics.arrays, int(statistics.token_count), "h", frozenset(), {}, datetime.now(UTC), trust
    )


def test_a_profile_is_judged_once_and_a_mean_counts_the_parts_that_are_doubted():
    counts = np.stack([routed(400, 16, 4, np.geomspace(1, 30, 16), seed) for seed in (1, 2)])
    good, little = made_of(counts, 400, 4), made_of(counts / 50, 8, 4)
    before = profile_of("before", good, Trust(1.0, 0.0, 1.0, 1.0, None, ("As it was judged.",)))
    assert judged(before) is before
    parts = [profile_of("good", good), profile_of("little", little), before]
    found = judged(profile_of("generalist", good), parts).trust
    assert found is not None
    assert found.figures == judge(good, 400).figures
    assert found.doubts == ("It is the mean of 3 profiles, of which 2 are doubted themselves; see their tasks.",)
    assert judged(profile_of("generalist", good), parts[:1]).doubts == ()
