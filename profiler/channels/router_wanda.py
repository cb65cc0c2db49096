"""router_wanda: weight times activation, weighted by the router (MoE-Pruner, arXiv 2410.12013), a channel at a time."""

from __future__ import annotations

import numpy as np

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class RouterWanda:
    """`s_c = sum_i |Wd_ic| * |w h_c|`, the norm over tokens: the source's score of the down projection, a
    column at a time.

    The source scores single weights of all three matrices and zeroes the lowest of each row, which saves no bytes
    without a sparse kernel; here its score chooses channels.
    """

    name = "router_wanda"
    version = "1"
    needs: Needs = frozenset({"channel_gated", "down_sums"})

    def score(self, statistics: Statistics) -> F64:
        return statistics.total("down_sums") * np.sqrt(statistics.total("channel_gated"))
