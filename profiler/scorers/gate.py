"""gate: the router weight an expert collects (the gate-score baseline of EASY-EP and of task-specific pruning)."""

from __future__ import annotations

from profiler.extras import NOTHING
from profiler.statistics import Statistics
from store.records import F64


class Gate:
    """`GATE_e = sum_t w_te` over the tokens routed to e."""

    name = "gate"
    version = "1"
    needs = NOTHING

    def score(self, statistics: Statistics) -> F64:
        return statistics.total("gates")
