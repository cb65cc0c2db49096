"""random: no knowledge at all, the floor that every other channel scorer must beat."""

from __future__ import annotations

import numpy as np

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class Random:
    """A seeded shuffle of each expert's channels."""

    name = "random"
    version = "1"
    needs: Needs = frozenset({"down_norms"})  # only their shape
    across = False

    def score(self, statistics: Statistics) -> F64:
        return np.random.default_rng(0).random(statistics.total("down_norms").shape)
