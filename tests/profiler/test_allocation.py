"""How many experts a share means, and which."""

from __future__ import annotations

import numpy as np
import pytest

from profiler.allocation import allocate, kept, uniform
from store.errors import BudgetError, InvalidInput


def test_every_layer_keeps_its_own_best():
    scores = np.array([[0.1, 0.5, 0.3, 0.2], [0.4, 0.2, 0.1, 0.3]])
    assert uniform(scores, 0.5, top_k=1).experts == ((1, 2), (0, 3))


def test_among_equals_the_lower_id_stays():
    assert uniform(np.zeros((1, 6)), 0.5, top_k=1).experts == ((0, 1, 2),)


@pytest.mark.parametrize(
    ("experts", "keep", "top_k", "count"),
    [(64, 0.5, 4, 32), (64, 1.0, 4, 64), (64, 0.01, 4, 4), (27, 0.5, 2, 14), (25, 0.5, 2, 13), (8, 0.125, 1, 1)],
)
def test_a_share_means_a_count(experts, keep, top_k, count):
    assert kept(experts, keep, top_k) == count


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_outside_its_range_is_refused(keep):
    with pytest.raises(InvalidInput, match=r"must lie in \(0, 1\]"):
        uniform(np.ones((1, 4)), keep, top_k=1)


def test_scores_that_are_not_numbers_are_refused_naming_the_layer():
    scores = np.ones((3, 4))
    scores[2, 1] = np.nan
    with pytest.raises(InvalidInput, match="scores of layer 2 are not finite"):
        uniform(scores, 0.5, top_k=1)


STRIPPED = np.array([[9.0, 8, 7, 6, 5, 4, 1, 0], [1, 0, 0, 0, 2, 0, 9, 3]])  # L 2, four experts in two strips each


def test_a_layer_keeps_strips_of_as_many_experts_as_a_token_goes_through() -> None:
    """Two of four strips would be one expert's; of four, the best two experts' best ones come first."""
    assert allocate("uniform", STRIPPED, 0.25, 4, strips=2).experts == ((0, 2), (4, 6))
    assert allocate("uniform", STRIPPED, 0.5, 4, strips=2).experts == ((0, 1, 2, 3), (0, 4, 6, 7))
    with pytest.raises(BudgetError, match="can't hold 2 experts"):
        allocate("uniform", STRIPPED, 3, 4, strips=2)


@pytest.mark.parametrize("allocator", ["uniform", "global", "coverage", "knapsack", "logistic"])
def test_strips_are_spent_to_the_last_and_larger_budgets_keep_enough_experts(allocator: str) -> None:
    scores = np.random.default_rng(0).random((3, 32)) ** 4
    for budget in (6, 11, 40, 96):
        kept_here = allocate(allocator, scores, budget, 8, strips=4)
        assert len(kept_here) == (budget // 3 * 3 if allocator == "uniform" else budget)
        assert all(len({strip // 4 for strip in ids}) >= 2 for ids in kept_here.experts)
    assert allocate(allocator, scores, 6, 8, strips=4) == allocate("uniform", scores, 6, 8, strips=4)
