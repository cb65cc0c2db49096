"""What a machine that drifts still tells: each measurement beside the same reference just before and just after it.

The ratio of a pair is the geometric mean of the two references over the measurement, so that a drift that goes on
evenly cancels, and who is as fast as the reference gets 1 in the median: with the plain mean it would get more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import median

WANTED = 0.9  # confidence


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """`low` to `high` hold the true median with `confidence`, whatever the distribution: they are two of the ratios
    themselves, in order. Few pairs give less than 0.9 however far apart these are: one gives 0, four 0.875."""

    median: float
    low: float
    high: float
    confidence: float
    pairs: int


def pair_ratio(before: float, measured: float, after: float) -> float:
    """Seconds of the reference before and after, over the seconds measured: above 1 is faster than the reference."""
    return sqrt(before * after) / measured


def paired_ratio(ratios: Sequence[float]) -> PairedRatio:
    """The narrowest interval between ratios of equal rank from both ends that has 0.9, else the widest there is."""
    ordered, count = sorted(ratios), len(ratios)
    rank, confidence = 0, _confidence(count, 0)
    while (narrower := _confidence(count, rank + 1)) >= WANTED:
        rank, confidence = rank + 1, narrower
    return PairedRatio(median(ordered), ordered[rank], ordered[count - 1 - rank], confidence, count)


def _confidence(count: int, rank: int) -> float:
    """That the true median lies between the ratios with `rank` others below and above: each is below it with 1/2."""
    outside: float = sum(comb(count, below) for below in range(rank + 1)) / 2**count
    return max(0.0, 1 - 2 * outside)
