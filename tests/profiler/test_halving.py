"""Halving: who survives, what it costs, and that the right one wins; and how sure a share is."""

from __future__ import annotations

import pytest

from profiler.evaluate import Measured
from profiler.halving import halve, slices
from store.intervals import wilson


def flat(share: float, start: int, end: int) -> Measured:
    """A candidate that is right at the same rate whatever the items."""
    count = end - start
    return Measured(count, round(share * count), count, (1 - share) * count, count, 0.5 * count)


def test_rounds_double_until_all_items_are_in():
    assert slices(100) == [12, 24, 48, 96, 100]
    assert slices(24) == [8, 16, 24]
    assert slices(5) == [5]
    assert slices(256) == [32, 64, 128, 256]


def test_where_more_items_tell_nothing_new_the_best_wins_as_in_a_full_evaluation():
    shares = [((7 * n) % 16) / 16 for n in range(16)]
    found = halve(list(enumerate(shares)), (), [16, 32, 64, 128], lambda one, *part: flat(one[1], *part))
    assert found.ranking[0][0][1] == max(shares)
    assert {one[1] for one, _ in found.ranking} == {15 / 16, 14 / 16}
    assert found.rounds == ((16, 16), (32, 8), (64, 4), (128, 2))
    assert found.ranking[0][1] == flat(15 / 16, 0, 128)


def test_no_item_is_run_twice_and_few_run_on_all():
    seen = []

    def measure(one, start, end):
        seen.append((one, start, end))
        return flat(one / 16, start, end)

    halve(range(16), (), [16, 32, 64, 128], measure)
    assert len(seen) == len(set(seen))
    assert sum(end - start for _, start, end in seen) == 16 * 16 + 8 * 16 + 4 * 32 + 2 * 64


def test_baselines_stay_to_the_end_however_bad_and_take_nobodys_place():
    found = halve([0.9, 0.8, 0.7, 0.6, 0.0], {0.0}, [10, 20], flat)
    assert [share for share, _ in found.ranking] == [0.9, 0.8, 0.0]


def test_among_equals_the_lower_nll_wins_and_then_the_earlier():
    def measure(one, start, end):
        return Measured(end, 1, end, {"a": 2.0, "b": 1.0, "c": 1.0}[one], end, end)

    assert [one for one, _ in halve("abc", "abc", [4], measure).ranking] == ["b", "c", "a"]


def test_without_responses_the_likelihood_decides():
    found = halve(
        [3, 1, 2], (), [8, 16], lambda nll, start, end: Measured(end - start, 0, 0, nll * 1.0, 1, end - start)
    )
    assert [nll for nll, _ in found.ranking] == [1, 2]


@pytest.mark.parametrize(
    ("right", "count", "low", "high"), [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (24, 24, 0.8620, 1.0)]
)
def test_wilsons_interval_is_the_published_one(right, count, low, high):
    found = wilson(right / count, count)
    assert found == pytest.approx((low, high), abs=1e-4)


def test_an_interval_of_nothing_is_our_own_bug():
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0.5, 0)
