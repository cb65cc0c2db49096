"""frequency: how often an expert is chosen, the baseline every pruning paper beats."""

from __future__ import annotations

from profiler.extras import NOTHING
from profiler.scorers.base import per_token
from profiler.statistics import Statistics
from store.records import F64


class Frequency:
    """`FREQ_e = n_e / T`."""

    name = "frequency"
    version = "1"
    needs = NOTHING

    def score(self, statistics: Statistics) -> F64:
        return per_token(statistics, "selected")
