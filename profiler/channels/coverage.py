"""coverage: how far the channel's three numbers move (activation score of arXiv 2606.18304)."""

from __future__ import annotations

import numpy as np

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class Coverage:
    """`s_c = (|h_c| + |up_c| + |gate_c|) / 3`, norms over tokens, divided by the layer's mean. No weights, no router.

    The source gives layers and experts widths of their own, so that every layer keeps an equal share of its score;
    `profiler/channels/widths.py` computes those. A pack has one width for all experts, and takes each one's best.
    """

    name = "coverage"
    version = "1"
    needs: Needs = frozenset({"channel_squares", "channel_inputs"})

    def score(self, statistics: Statistics) -> F64:
        h = np.sqrt(statistics.total("channel_squares"))  # [L, E, F]
        scores: F64 = (h + np.sqrt(statistics.total("channel_inputs")).sum(axis=0)) / 3  # [L, E, F]
        mean = scores.mean(axis=(1, 2), keepdims=True)  # [L, 1, 1]
        found: F64 = np.divide(scores, mean, out=np.zeros_like(scores), where=mean > 0)
        return found
