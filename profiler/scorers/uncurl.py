"""uncurl: of experts that the router likes for the same tokens, one stays (after UNCURL, arXiv 2409.01483)."""

from __future__ import annotations

import numpy as np

from profiler.clusters import absorbed_at
from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64


class Uncurl:
    """How unlike the others' an expert's logits are: the distance `1 - cos(z_i, z_j)` over all tokens at which a busier

    expert's cluster absorbs it. UNCURL clusters the same similarity and then merges weights with a tuned model after
    it; with frozen weights one member stays instead. Our reading: its method section was not at hand. Logits are taken
    less each token's mean, so that a constant added to all of them changes nothing.
    """

    name = "uncurl"
    version = "1"
    needs: Needs = frozenset({"logit_products"})

    def score(self, statistics: Statistics) -> F64:
        products = statistics.total("logit_products")  # [L, E, E]
        lengths = np.sqrt(np.einsum("lee->le", products))  # [L, E]
        scale = lengths[:, :, None] * lengths[:, None, :]  # [L, E, E]
        cosine = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
        return absorbed_at(1.0 - cosine, statistics.total("gates"), statistics.total("selected") > 0)
