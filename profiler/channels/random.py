"""random: no knowledge at all, the floor that every other channel scorer must beat."""

from __future__ import annotations

import hashlib

import numpy as np

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class Random:
    """A shuffle of each expert's channels, the same for the same text and another for every other task or draw of it.

    What the text's tokens were routed to is the seed and no more, as for the scorer of experts of this name.
    """

    name = "random"
    version = "2"
    needs: Needs = frozenset({"down_norms"})  # only their shape

    def score(self, statistics: Statistics) -> F64:
        seed = hashlib.sha256(statistics.total("selected").tobytes()).digest()
        return np.random.default_rng(list(seed)).random(statistics.total("down_norms").shape)
