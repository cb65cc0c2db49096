"""heapr, heapr_used: what the loss loses without the channel, to second order (HEAPr, arXiv 2509.22299)."""

from __future__ import annotations

import numpy as np

from profiler.channels.base import per_token
from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class Heapr:
    """`s_c = mean_t(h_tc^2) * mean_t(q_tc^2)`, q the gradient of the loss by h; -1 where no token was routed.

    The source writes `mean(h_c^2) * Wd_c^T G Wd_c` with `G = mean_t g_t g_t^T`, g the gradient by the expert's output
    before its weight: since `q = g Wd` the two are equal, and q needs no H x H matrix. Both means are over routed
    tokens, so a rare expert is not discounted; `heapr_used` multiplies by the share of tokens that it gets.
    """

    version = "1"
    needs: Needs = frozenset({"channel_squares", "channel_gradients"})

    def __init__(self, *, by_use: bool = False) -> None:
        self.name = "heapr_used" if by_use else "heapr"
        self._by_use = by_use

    def score(self, statistics: Statistics) -> F64:
        scores = per_token(statistics, "channel_squares") * statistics.total("channel_gradients")  # [L, E, F]
        routed = statistics.total("selected")[:, :, None]  # [L, E, 1]
        if self._by_use:
            scores = scores * routed / max(statistics.token_count, np.finfo(np.float64).tiny)
        found: F64 = np.where(routed > 0, scores, -1.0)
        return found
