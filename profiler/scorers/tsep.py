"""tsep: who holds out longest when the weakest are dropped window by window (after TSEP, arXiv 2206.00277)."""

from __future__ import annotations

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class Tsep:
    """The window at whose end the expert is dropped: `a_e = sum_t w_te / sum over alive`, weakest first.

    Unlike `gate`, later windows see where the tokens of the dropped went. The source tunes the model between windows
    and goes on to one expert; weights are frozen here, and K experts a layer stay.
    """

    name = "tsep"
    version = "1"
    needs: Needs = frozenset({"dropping"})

    def score(self, statistics: Statistics) -> F64:
        return statistics.total("dropping")
