"""reap: what an expert adds to the stream when it is asked (REAP, arXiv 2510.13999)."""

from __future__ import annotations

from profiler.extras import NOTHING
from profiler.scorers.base import per_routed
from profiler.statistics import Statistics
from store.records import F64


class Reap:
    """`REAP_e = (1/n_e) sum_{t: e in S_t} w_te |o_te|`, 0 where n_e = 0: a mean over routed tokens, blind to frequency.

    w is the weight that the model applies, renormalised where the model renormalises.
    """

    name = "reap"
    version = "1"
    needs = NOTHING

    def score(self, statistics: Statistics) -> F64:
        return per_routed(statistics, "gated_norms")
