"""random: no knowledge at all, the floor that every other scorer must beat."""

from __future__ import annotations

import hashlib

import numpy as np

from profiler.extras import NOTHING
from profiler.statistics import Statistics
from store.records import F64


class Random:
    """A shuffle of each layer, the same for the same text and another for every other task or draw of it.

    What the text's tokens were routed to is the seed and no more: the scores of two texts have nothing in common, and
    how far they spread says what chance does.
    """

    name = "random"
    version = "2"
    needs = NOTHING

    def score(self, statistics: Statistics) -> F64:
        seed = hashlib.sha256(statistics.total("selected").tobytes()).digest()
        return np.random.default_rng(list(seed)).random((statistics.layers, statistics.experts))
