"""The rules of how many experts a layer gets: by hand, against brute force, and what holds for any scores."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from profiler.allocation import allocate as allocate_plainly
from profiler.allocation import kept, uniform
from profiler.allocators import ALLOCATORS, Layers, logistic
from profiler.statistics import Statistics
from store.errors import BudgetError, InvalidInput
from store.records import Selection

TWO = np.array([[8.0, 1, 1, 0], [4.0, 3, 2, 1]])
NAMES = sorted(ALLOCATORS)
NESTED = ["uniform", "global", "coverage", "logistic", "diep"]  # a larger budget keeps what a smaller one keeps

scores_of_layers = st.tuples(st.integers(1, 4), st.integers(2, 8)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-3, 20).map(float))
)
sizes = st.lists(st.integers(1, 9), min_size=4, max_size=4)


def statistics_for(scores: np.ndarray) -> Statistics:
    """Whatever extra an allocator reads beside the scores, made of the scores, so that examples shrink well."""
    found = Statistics.zeros(*scores.shape, top_k=1)
    values = np.maximum(scores, 0)[:, ::-1] + 0.5
    return found.with_extras({name: values for one in ALLOCATORS.values() for name in one.needs})


def allocate(name, scores, budget, top_k, costs=None):
    return allocate_plainly(name, scores, budget, top_k, costs, statistics_for(scores))


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
    wanted = {"uniform": [4, 4], "global": [4, 4], "coverage": [4, 4], "knapsack": [8, 3]}
    assert {name: counts(allocate(name, flat, 20, 1, [1, 4])) for name in wanted} == wanted


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


@pytest.mark.parametrize("name", ["coverage", "knapsack"])
@pytest.mark.parametrize("seed", range(8))
def test_layers_that_are_covered_but_for_rounding_share_what_is_left_alike(name, seed):
    """Seven experts of each layer hold everything; sums in another order differ in their last bits."""
    draw = np.random.default_rng(seed)
    scores = np.zeros((6, 16))
    scores[:, :7] = draw.random((6, 7))
    noisy = scores * (1 + 1e-15 * draw.normal(size=scores.shape))
    found = allocate(name, scores, 72, 1)
    assert counts(allocate(name, noisy, 72, 1)) == counts(found)
    assert name == "knapsack" or counts(found) == [12] * 6


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
    elif name == "lexi":
        assert error_left(scores, large) <= error_left(scores, small) + 1e-12
    else:
        assert np.prod(coverages(scores, small)) <= np.prod(coverages(scores, large)) + 1e-12


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(scores_of_layers, st.floats(0.01, 1.0))
def test_a_share_costs_what_the_same_number_everywhere_would(name, scores, keep):
    layers, experts = scores.shape
    found = allocate(name, scores, keep, top_k=1)
    assert len(found) <= layers * kept(experts, keep, 1)
    assert name in {"knapsack", "lexi"} or len(found) == len(uniform(scores, keep, 1))
    assert allocate(name, scores, 1.0, top_k=1) == uniform(scores, 1.0, 1)


def error_left(scores, selection) -> float:
    """What the layers lose in all, read from the extra: with m experts left, the m-th largest value counted from 0."""
    [extra] = ALLOCATORS["lexi"].needs
    rows = -np.sort(-statistics_for(scores).total(extra), axis=1)
    return sum(float([*row, 0.0][len(ids)]) for row, ids in zip(rows, selection.experts, strict=True))


@settings(max_examples=60, deadline=None)
@given(scores_of_layers, sizes, st.integers(0, 120))
def test_lexi_s_program_finds_the_least_error(scores, costs, extra):
    costs = costs[: len(scores)]
    budget = sum(costs) + extra
    found = allocate("lexi", scores, budget, 1, costs)
    ways = product(range(1, scores.shape[1] + 1), repeat=len(scores))
    fitting = [way for way in ways if sum(c * n for c, n in zip(costs, way, strict=False)) <= budget]
    best = min(error_left(scores, Selection.of([range(n) for n in way])) for way in fitting)
    assert error_left(scores, found) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(("budget", "cost", "chosen"), [(6, 2, [3, 2, 1]), (5, 4, [3, 1, 1]), (7, 1, [3, 3, 1])])
def test_lexi_s_published_toy_program(budget, cost, chosen):
    """Errors 9 4 0, 3 1 0, 1 .5 0 with one, two and three left."""
    errors = np.array([[9.0, 4, 0], [3, 1, 0], [1, 0.5, 0]])
    guide = np.concatenate([errors[:, :1] + 1, errors[:, :-1]], axis=1)  # the last to go has the highest value
    found = ALLOCATORS["lexi"].rule(Layers(np.ones((3, 3)) / 3, [1, 1, 1], 1, guide), budget)
    assert sum(errors[layer, count - 1] for layer, count in enumerate(found)) == cost
    assert found == chosen


def test_the_logistic_curve_is_seap_s():
    """32 layers, a fifth to lose: SEAP protects four, the first and last of the others lose .163 and .236."""
    layers, experts = 28, 4000
    found = logistic(Layers(np.ones((layers, experts)), [1] * layers, 1), round(0.8 * layers * experts))
    lost = [1 - count / experts for count in found]
    assert lost[0] == pytest.approx(0.163, abs=2e-3)
    assert lost[-1] == pytest.approx(0.236, abs=2e-3)
    assert lost == sorted(lost)


def test_an_allocator_that_needs_more_than_scores_says_so():
    with pytest.raises(InvalidInput, match="allocator lexi needs the statistic elimination"):
        allocate_plainly("lexi", TWO, 0.5, top_k=1)


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
    with pytest.raises(InvalidInput, match=r"no allocator 'best'. Choose from: uniform, global, coverage"):
        allocate("best", TWO, 0.5, top_k=1)
