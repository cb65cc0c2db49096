"""peu: predicted expert utility (PreMoE v3, arXiv 2505.17639v3, section 3): confident choices only, never negative."""

from __future__ import annotations

import numpy as np

from profiler.extras import NOTHING
from profiler.scorers.base import break_ties
from profiler.statistics import BINS, Statistics
from store.records import F64


class Peu:
    """`PEU_e = (1/T) sum_t f(z_te) [p_te >= r_l]`, `f(z) = max(z, sigmoid(z))`, p softmax over a token's top K logits.

    The threshold adapts to the layer: `r_l = (1/T) sum_t max_e p_te`. The sum over p >= r is read from a histogram of
    p: exact but for the one bin that r falls into, whose mass counts by its share above r. Many experts get exactly 0,
    so ties are broken by the sum of gates (ours; the paper says nothing).
    """

    name = "peu"
    version = "1"
    needs = NOTHING

    def score(self, statistics: Statistics) -> F64:
        return break_ties(utility(statistics), statistics.total("gates"))


def thresholds(statistics: Statistics) -> F64:
    """r_l, f64 `[L]`."""
    return statistics.total("top_shares") / max(statistics.token_count, np.finfo(np.float64).tiny)


def utility(statistics: Statistics) -> F64:
    """PEU without tie-breaking, f64 `[L, E]`."""
    share = _share_above(statistics)  # [L, B]
    mass: F64 = np.einsum("leb,lb->le", statistics.total("utility"), share)
    return mass / max(statistics.token_count, np.finfo(np.float64).tiny)


def error_bound(statistics: Statistics) -> F64:
    """How far `utility` can be from the exact sum: the mass of the bin that holds r_l, f64 `[L, E]`."""
    share = _share_above(statistics)  # [L, B]
    divided = ((share > 0) & (share < 1)).astype(np.float64)
    doubt = np.maximum(share, 1 - share) * divided
    mass: F64 = np.einsum("leb,lb->le", statistics.total("utility"), doubt)
    return mass / max(statistics.token_count, np.finfo(np.float64).tiny)


def _share_above(statistics: Statistics) -> F64:
    """How much of each bin lies at or above the layer's threshold, f64 `[L, B]`, between 0 and 1."""
    low = 1.0 / statistics.top_k
    width = (1.0 - low) / BINS
    if width == 0:  # top-1 routing: every p is 1 and passes
        return np.ones((statistics.layers, BINS))
    upper = low + width * np.arange(1, BINS + 1)  # [B]
    return np.clip((upper[None, :] - thresholds(statistics)[:, None]) / width, 0.0, 1.0)
