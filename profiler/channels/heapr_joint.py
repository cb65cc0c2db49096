"""heapr_joint: what the loss loses without the channel, token by token (HEAPr, arXiv 2509.22299, one mean; ours)."""

from __future__ import annotations

import numpy as np

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class HeaprJoint:
    """`s_c = mean_t((h_tc q_tc)^2)`, q the gradient of the loss by h; -1 where no token was routed.

    HEAPr multiplies two means, of h^2 and of q^2, which takes a token's h and q for independent. Here a channel counts
    where both are large on the same token.
    """

    name = "heapr_joint"
    version = "1"
    needs: Needs = frozenset({"channel_products"})

    def score(self, statistics: Statistics) -> F64:
        return np.where(statistics.total("selected")[:, :, None] > 0, statistics.total("channel_products"), -1.0)
