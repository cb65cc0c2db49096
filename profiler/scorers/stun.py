"""stun, stun_router: of experts that behave alike, one stays (STUN, arXiv 2409.06211, first stage)."""

from __future__ import annotations

from typing import Literal

from profiler.clusters import absorbed_at
from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class Stun:
    """How unlike the others an expert is: the distance at which a busier expert's cluster absorbs it.

    `stun` takes `D_ij = -a_ij / mean(a)`, a_ij counting the tokens that were routed to both (the released command for
    Arctic); `stun_router` takes `D_ij = |Wg_i - Wg_j|` and looks at no text but to see who is busy. Clusters grow by
    STUN's rule with a threshold that rises (clusters.py), which turns its clusters into one ranking for all sizes. Two
    differences: the survivor is the member with most router weight on this task, where STUN reads all experts' weights
    for the one nearest to the mean, and an expert that no token was routed to ranks last: without co-activation it
    would pass for unique.
    """

    version = "1"

    def __init__(self, distance: Literal["coactivation", "router"]) -> None:
        self.name = "stun" if distance == "coactivation" else "stun_router"
        self._needed = "coactivations" if distance == "coactivation" else "router_distances"

    @property
    def needs(self) -> Needs:
        return frozenset({self._needed})

    def score(self, statistics: Statistics) -> F64:
        distances = statistics.total(self._needed)  # [L, E, E]
        if self._needed == "coactivations":
            mean = distances.mean(axis=(1, 2), keepdims=True)  # [L, 1, 1]
            distances = -distances / (mean + (mean == 0))
        return absorbed_at(distances, statistics.total("gates"), statistics.total("selected") > 0)
