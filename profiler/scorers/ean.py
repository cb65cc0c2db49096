"""ean: how loud an expert is in all (expert activation norm, a baseline of REAP, arXiv 2510.13999)."""

from __future__ import annotations

from profiler.extras import NOTHING
from profiler.statistics import Statistics
from store.records import F64


class Ean:
    """`EAN_e = sum_{t: e in S_t} |o_te|`: the sum, so frequency counts; no router weight."""

    name = "ean"
    version = "1"
    needs = NOTHING

    def score(self, statistics: Statistics) -> F64:
        return statistics.total("norms")
