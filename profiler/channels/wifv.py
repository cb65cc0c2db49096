"""wifv: how much a channel's contribution varies (SEAP, arXiv 2503.07605, after FLAP)."""

from __future__ import annotations

import numpy as np

from profiler.channels.base import ROUNDING, per_token
from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class Wifv:
    """`s_c = Var_t(h_c) * |Wd_c|^2`, over the tokens routed to the expert: a channel that is constant scores 0.

    What a constant channel gives can be put into a bias behind the down projection; `Pack.compensate` does it for the
    families that have one. Exact sums, where the released code loses the first prompt's variance.
    """

    name = "wifv"
    version = "1"
    needs: Needs = frozenset({"channel_sums", "channel_squares", "down_norms"})

    def score(self, statistics: Statistics) -> F64:
        squares, mean = per_token(statistics, "channel_squares"), per_token(statistics, "channel_sums")
        spread = squares - mean**2  # [L, E, F]
        return np.where(spread > ROUNDING * squares, spread, 0.0) * statistics.total("down_norms") ** 2
