"""gate_norm: what an expert adds to the stream in all (REAP's companion, arXiv 2510.13999; EASY-EP without s_t)."""

from __future__ import annotations

from profiler.extras import NOTHING
from profiler.statistics import Statistics
from store.records import F64


class GateNorm:
    """`GN_e = sum_{t: e in S_t} w_te |o_te|`, which is `n_e * REAP_e`: frequency counts."""

    name = "gate_norm"
    version = "1"
    needs = NOTHING

    def score(self, statistics: Statistics) -> F64:
        return statistics.total("gated_norms")
