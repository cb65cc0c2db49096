"""The rules of how many experts a layer gets: by hand, against brute force, and what holds for any scores."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from profiler.allocation import allocate, kept, uniform
from profiler.allocators import ALLOCATORS
from store.errors import BudgetError, InvalidInput

TWO = np.array([[8.0, 1, 1, 0], [4.0, 3, 2, 1]])
NAMES = sorted(ALLOCATORS)
NESTED = ["uniform", "global", "coverage"]

scores_of_layers = st.tuples(st.integers(1, 4), st.integers(2, 8)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-3, 20).map(float))
)
sizes = st.lists(st.integers(1, 9), min_size=4, max_size=4)


def counts(selection) -> list[int]:
    return [len(ids) for ids in selection.experts]


def shares(scores: np.ndarray) -> np.ndarray:
    worth = np.maximum(scores, 0)
    sums = worth.sum(axis=1, keepdims=True)
    return np.where(sums > 0, worth / np.where(sums > 0, sums, 1), 1 / scores.shape[1])


def coverages(scores: np.ndarray, selection) -> list[float]:
    return [float(row[list(ids)].sum()) for row, ids in zip(shares(scores), selection.experts, strict=True)]


def spent(selection, costs) -> int:
    return sum(count * cost for count, cost in zip(counts(selection), costs, strict=False))


def test_equal_coverage_gives_the_flat_layer_more():
    found = allocate("coverage", TWO, 0.5, top_k=1)
    assert counts(found) == [1, 3]
    np.testing.assert_allclose(coverages(TWO, found), [0.8, 0.9])


def test_one_threshold_takes_the_largest_shares_of_all():
    assert allocate("global", TWO, 0.5, top_k=1).experts == ((0,), (0, 1, 2))
    peaked = np.array([[8.0, 1, 1, 0], [4.0, 4, 1, 1]])
    assert allocate("global", peaked, 0.5, top_k=1).experts == ((0, 1), (0, 1))  # 0.8 0.4 0.4, then 0.1 of layer 0


def test_cheap_layers_get_more_for_the_same_bytes():
    flat = np.ones((2, 8))
    found = {name: counts(allocate(name, flat, 40, 1, [1, 4])) for name in NAMES}
    assert found["uniform"] == found["coverage"] == [8, 8]
    assert {name: counts(allocate(name, flat, 20, 1, [1, 4])) for name in NAMES} == {
        "uniform": [4, 4], "global": [4, 4], "coverage": [4, 4], "knapsack": [8, 3],
    }  # fmt: skip


def brute_force(scores, costs, budget, floor, aim) -> float:
    """The best aim over every way to spend the budget."""
    ranked = np.cumsum(-np.sort(-shares(scores), axis=1), axis=1)
    ways = product(range(floor, scores.shape[1] + 1), repeat=len(scores))
    fitting = [way for way in ways if sum(c * n for c, n in zip(costs, way, strict=False)) <= budget]
    return max(aim([ranked[layer, n - 1] for layer, n in enumerate(way)]) for way in fitting)


@settings(max_examples=60, deadline=None)
@given(scores_of_layers, sizes, st.integers(0, 200))
def test_the_knapsack_finds_the_best_product_of_coverages(scores, costs, extra):
    costs = costs[: len(scores)]
    budget = sum(costs) + extra
    found = allocate("knapsack", scores, budget, 1, costs)
    best = brute_force(scores, costs, budget, 1, lambda covered: float(np.prod(covered)))
    assert np.prod(coverages(scores, found)) == pytest.approx(best, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(scores_of_layers, st.integers(0, 40))
def test_equal_coverage_finds_the_highest_least_coverage(scores, extra):
    budget = len(scores) + extra
    found = allocate("coverage", scores, budget, 1)
    assert min(coverages(scores, found)) == pytest.approx(brute_force(scores, [1] * 4, budget, 1, min), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(scores_of_layers, st.integers(0, 40))
def test_one_threshold_finds_the_largest_sum_of_shares(scores, extra):
    budget = len(scores) + extra
    found = allocate("global", scores, budget, 1)
    assert sum(coverages(scores, found)) == pytest.approx(brute_force(scores, [1] * 4, budget, 1, sum), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(scores_of_layers, sizes, st.integers(1, 2), st.integers(0, 120), st.integers(0, 40))
def test_every_rule_fits_keeps_the_floor_and_never_does_worse_with_more(name, scores, costs, top_k, extra, more):
    costs = costs[: len(scores)]
    budget = top_k * sum(costs) + extra
    small = allocate(name, scores, budget, top_k, costs)
    large = allocate(name, scores, budget + more, top_k, costs)
    assert small == allocate(name, scores.copy(), budget, top_k, costs)
    assert spent(small, costs) <= budget
    assert min(counts(small)) >= top_k
    for layer, ids in enumerate(small.experts):
        left = scores[layer, [e for e in range(scores.shape[1]) if e not in ids]]
        assert left.size == 0 or left.max() <= scores[layer, list(ids)].min()
    if name in NESTED:
        assert set(small) <= set(large)
    else:
        assert np.prod(coverages(scores, small)) <= np.prod(coverages(scores, large)) + 1e-12


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(scores_of_layers, st.floats(0.01, 1.0))
def test_a_share_costs_what_the_same_number_everywhere_would(name, scores, keep):
    layers, experts = scores.shape
    found = allocate(name, scores, keep, top_k=1)
    assert len(found) <= layers * kept(experts, keep, 1)
    assert name == "knapsack" or len(found) == len(uniform(scores, keep, 1))
    assert allocate(name, scores, 1.0, top_k=1) == uniform(scores, 1.0, 1)


def test_bytes_that_are_no_multiple_of_anything_are_counted_in_coarser_units():
    """Two layers of 64 experts of 1,000,003 and 999,983 bytes: the table would have a cell for every byte."""
    draw = np.random.default_rng(0).random((2, 64)) ** 4
    budget = 50_000_000
    found = allocate("knapsack", draw, budget, 2, [1_000_003, 999_983])
    assert 49 <= len(found) <= 50
    assert spent(found, [1_000_003, 999_983]) <= budget


def test_a_budget_below_the_floor_and_an_unknown_rule_are_refused():
    with pytest.raises(BudgetError, match="can't hold 2 experts"):
        allocate("coverage", TWO, 3, top_k=2)
    with pytest.raises(InvalidInput, match=r"no allocator 'best'. Choose from: uniform, global, coverage, knapsack"):
        allocate("best", TWO, 0.5, top_k=1)
