"""Ratios of pairs: a drift cancels, and the interval is as sure as it says."""

from __future__ import annotations

import random
from statistics import median

import pytest

from benchmarks.paired import pair_ratio, paired_ratio


def test_a_drift_that_goes_on_evenly_cancels() -> None:
    assert pair_ratio(1.0, 2 * 1.3, 1.69) == pytest.approx(0.5)


def test_who_is_as_fast_as_the_reference_gets_one_however_much_the_disk_drifts() -> None:
    rng = random.Random(0)
    ratios = [pair_ratio(*(rng.lognormvariate(0, 0.5) for _ in range(3))) for _ in range(4001)]
    assert median(ratios) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("count", "low", "high", "confidence"),
    [(1, 0, 0, 0.0), (4, 0, 3, 0.875), (5, 0, 4, 0.9375), (8, 1, 6, 1 - 18 / 256), (11, 2, 8, 1 - 134 / 2048)],
)
def test_the_interval_is_the_narrowest_that_has_nine_tenths(count: int, low: int, high: int, confidence: float) -> None:
    found = paired_ratio([float(number) for number in reversed(range(count))])
    assert (found.low, found.high, found.confidence, found.pairs) == (low, high, confidence, count)
    assert found.low <= found.median <= found.high


def test_the_true_median_lies_inside_as_often_as_is_said() -> None:
    rng = random.Random(1)
    drawn = [paired_ratio([rng.lognormvariate(0, 0.4) for _ in range(8)]) for _ in range(4000)]
    inside = sum(each.low <= 1 <= each.high for each in drawn) / len(drawn)
    assert inside == pytest.approx(drawn[0].confidence, abs=0.015)
