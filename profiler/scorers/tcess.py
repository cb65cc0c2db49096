"""tcess: how much the router wants the expert when it wants it most (PreMoe v1, arXiv 2505.17639, released code)."""

from __future__ import annotations

from profiler.extras import NOTHING
from profiler.scorers.base import per_token
from profiler.statistics import Statistics
from store.records import F64


class Tcess:
    """`TCESS_e = (1/T) sum_t z_te [e = argmax z_t]`: raw logits, a pool of one, no threshold, as the code does.

    An expert that is only ever first with a negative logit ranks below one that is never first; `peu` mends that.
    """

    name = "tcess"
    version = "1"
    needs = NOTHING

    def score(self, statistics: Statistics) -> F64:
        return per_token(statistics, "top_logits")
