"""diep: router weight times an importance that was learned by gradients (DiEP, arXiv 2509.16105)."""

from __future__ import annotations

from profiler.extras import Needs
from profiler.scorers.base import per_token
from profiler.statistics import Statistics
from store.records import F64


class Diep:
    """`beta_l E softmax(alpha_l)_e (1/T) sum_t w_te`, alpha and beta trained with all weights frozen.

    The source ranks by `alpha beta` alone, raw: for alpha < 0 a larger beta then lowers the score, and with a router an
    expert that no token reaches gets no gradient and keeps its first value. Router weight mends both (ours).
    """

    name = "diep"
    version = "1"
    needs: Needs = frozenset({"relaxation"})

    def score(self, statistics: Statistics) -> F64:
        return statistics.total("relaxation") * per_token(statistics, "gates")
