"""camera, heapr_unit: what a score of channels says of an expert, or of one strip of an expert: their sum (ours)."""

from __future__ import annotations

import numpy as np

from profiler.channels.base import ChannelScorer
from profiler.statistics import Statistics
from store.records import F64


class ChannelSums:
    """`score_e = sum_c max(s_c, 0)` over the expert's channels: both sources add channels up under one threshold.

    Below zero is what a scorer says of an expert that no token reached.
    """

    def __init__(self, channels: ChannelScorer) -> None:
        self._channels = channels
        self.name, self.version, self.needs = channels.name, channels.version, channels.needs

    def score(self, statistics: Statistics) -> F64:
        sums: F64 = np.maximum(self._channels.score(statistics), 0.0).sum(axis=2)
        return sums
