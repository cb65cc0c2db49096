"""heapr_unit: what a channel writes in the direction that the answers' loss minds, every token alike (after HEAPr)."""

from __future__ import annotations

import numpy as np

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class HeaprUnit:
    """`s_c = mean_t((w_t h_tc q_tc / |q_t|)^2)`, q the gradient of the responses' loss by h, w the router's weight; -1
    where no token was routed. Ours, after HEAPr (arXiv 2509.22299). All tokens' loss where there are no responses.

    Gradients of a model that is nearly always right lie on a few tokens, which then decide everything; their directions
    lie on all. CAMERA's `|Wd_c|^2 (w h_c)^2` asks how much a channel writes; this, how much of it the loss minds.
    """

    name = "heapr_unit"
    version = "1"
    needs: Needs = frozenset({"channel_directions"})

    def score(self, statistics: Statistics) -> F64:
        return np.where(statistics.total("selected")[:, :, None] > 0, statistics.total("channel_directions"), -1.0)
