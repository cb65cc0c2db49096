"""random: no knowledge at all, the floor that every other scorer must beat."""

from __future__ import annotations

import numpy as np

from profiler.extras import NOTHING
from profiler.statistics import Statistics
from store.records import F64


class Random:
    """A seeded shuffle of each layer; the statistics give nothing but their shape."""

    name = "random"
    needs = NOTHING

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self.version = f"1-seed{seed}"

    def score(self, statistics: Statistics) -> F64:
        return np.random.default_rng(self._seed).random((statistics.layers, statistics.experts))
