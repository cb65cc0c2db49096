"""easy_ep: an expert's output on the tokens that the layer changes (EASY-EP, arXiv 2504.06792)."""

from __future__ import annotations

from profiler.extras import NOTHING
from profiler.statistics import Statistics
from store.records import F64


class EasyEp:
    """`EASY_e = sum_t s_t w_te |o_te|`, `s_t = max(0, 1 - cos(h_t, h_t + y_t))`: a sum, so frequency counts.

    h is the residual before the MoE block, y its routed output without shared experts.
    """

    name = "easy_ep"
    version = "1"
    needs = NOTHING

    def score(self, statistics: Statistics) -> F64:
        return statistics.total("shifted_norms")
