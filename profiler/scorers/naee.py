"""naee, naee_answers: what the layer loses when the expert goes too, tried out greedily (NAEE, arXiv 2402.14800)."""

from __future__ import annotations

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class Naee:
    """Greedy backward elimination of `sum_t |F(x_t) - F'(x_t; kept)|^2`, the router choosing again among the kept.

    NAEE tries every set of one size (C(E, r) of them) and takes norms a batch; here one expert goes at a time, so one
    ranking serves all sizes and E may be large, and errors are squared a token, so batching changes nothing. Errors
    count as shares of the layer's output, which makes layers comparable. `answers`: over response tokens alone (ours).
    """

    version = "1"

    def __init__(self, *, answers: bool = False) -> None:
        self.name = "naee_answers" if answers else "naee"
        self._extra = "answer_elimination" if answers else "elimination"
        self.needs: Needs = frozenset({self._extra})

    def score(self, statistics: Statistics) -> F64:
        return statistics.total(self._extra)
