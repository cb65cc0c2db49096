"""router_growth: whose router row grew in fine-tuning (provably effective pruning, arXiv 2405.16646)."""

from __future__ import annotations

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class RouterGrowth:
    """`|Wg_e| - |base Wg_e|`: the difference of the norms, signed, not the norm of the difference.

    Needs the checkpoint that this one was tuned from, and no text at all. The source leaves all router rows in place
    and lets dropped experts give zeros; here the router is limited to the others, as for every scorer.
    """

    name = "router_growth"
    version = "1"
    needs: Needs = frozenset({"router_growth"})

    def score(self, statistics: Statistics) -> F64:
        return statistics.total("router_growth")
