"""naee_exact: of all sets of a size the one inside which the layer loses least (NAEE, arXiv 2402.14800)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from profiler.enumeration import place
from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64, Selection


class NaeeExact:
    """`argmin over |C| = r of |F(X) - F'(X; C)|`, the router choosing again inside C. For at most 8 experts a layer.

    The best sets of two sizes need not lie in each other, so no ranking holds them: `pick` reads the sets themselves.
    `score` is what the layer loses without the expert alone, for the allocators' sake.
    """

    name = "naee_exact"
    version = "1"
    needs: Needs = frozenset({"subset_losses"})

    def score(self, statistics: Statistics) -> F64:
        losses = statistics.total("subset_losses")  # [L, 2^E]
        whole = (1 << statistics.experts) - 1
        alone = losses[:, [whole & ~(1 << expert) for expert in range(statistics.experts)]]  # [L, E]
        # A token needs K experts: where E = K no set lacks one, and all are worth the same.
        return np.where(np.isfinite(alone), alone, 1.0)

    def pick(self, statistics: Statistics, counts: Sequence[int]) -> Selection:
        """The best set of `counts[layer]` experts in each layer; among equals the one of lower ids."""
        losses = statistics.total("subset_losses")  # [L, 2^E]
        chosen = []
        for row, count in zip(losses, counts, strict=True):
            sets = list(combinations(range(statistics.experts), count))
            chosen.append(min(sets, key=lambda kept, row=row: (float(row[place(kept)]), kept)))  # type: ignore[misc]
        return Selection.of(chosen)
