"""How many channels each group would keep if all groups covered an equal share of their score. Pure numpy.

After arXiv 2606.18304: bisect a common coverage until the widths fit the budget. Groups are layers, or the experts
of one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from store.records import F64

Counts = npt.NDArray[np.int64]

STEPS = 60


def equal_coverage(scores: F64, budget: int, floor: int = 0) -> Counts:
    """`scores` f64 [G, F] >= 0 -> widths i64 [G] that sum up to `budget` exactly, none below `floor`.

    `k_g(s)` is the fewest channels, best first, whose scores reach the share s of the group's sum. s is the largest
    that fits; what is left over goes, one by one, to the group that is covered least.
    """
    groups, width = scores.shape
    assert floor * groups <= budget <= groups * width, (floor, budget, scores.shape)
    covered = covered_by(scores)  # [G, F + 1]
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if _counts(covered, middle, floor).sum() <= budget:
            low = middle
        else:
            high = middle
    counts = _counts(covered, low, floor)
    while counts.sum() < budget:
        now = np.take_along_axis(covered, counts[:, None], axis=1)[:, 0]  # [G]
        counts[int(np.argmin(np.where(counts < width, now, np.inf)))] += 1
    return counts


def covered_by(scores: F64) -> F64:
    """The share of a group's score that its best 0, 1, ... F channels hold, f64 [G, F + 1]; equal where all are 0."""
    worth = np.sort(np.maximum(scores, 0.0), axis=1)[:, ::-1]
    worth = np.where(worth.sum(axis=1, keepdims=True) > 0, worth, 1.0)
    sums = np.cumsum(worth, axis=1)
    return np.concatenate([np.zeros((len(scores), 1)), sums / sums[:, -1:]], axis=1)


def _counts(covered: F64, share: float, floor: int) -> Counts:
    reached = (covered < share - 1e-12).sum(axis=1)  # how many prefixes fall short
    counts: Counts = np.clip(reached, floor, covered.shape[1] - 1).astype(np.int64)
    return counts
