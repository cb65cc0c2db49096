"""man, msan: how loud an expert is when it is asked (mean activation norm, arXiv 2606.15716)."""

from __future__ import annotations

from profiler.extras import NOTHING
from profiler.scorers.base import per_routed
from profiler.statistics import Statistics
from store.records import F64


class Man:
    """`MAN_e = (1/n_e) sum_{t: e in S_t} |o_te|`, 0 where n_e = 0: blind to frequency and to the router's weight."""

    name = "man"
    version = "1"
    needs = NOTHING

    def score(self, statistics: Statistics) -> F64:
        return per_routed(statistics, "norms")


class Msan:
    """`MSAN_e = (1/n_e) sum_{t: e in S_t} |o_te|^2`: the same with squares, so that outliers weigh more."""

    name = "msan"
    version = "1"
    needs = NOTHING

    def score(self, statistics: Statistics) -> F64:
        return per_routed(statistics, "squared_norms")
