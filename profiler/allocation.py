"""From scores to a selection: how many experts each layer keeps, and which. Pure numpy."""

from __future__ import annotations

import math

import numpy as np

from store.errors import InvalidInput
from store.records import F64, Selection

UNIFORM = "uniform"


def kept(experts: int, keep: float, top_k: int) -> int:
    """How many experts of a layer a share means: never fewer than one token needs."""
    if not (math.isfinite(keep) and 0 < keep <= 1):
        raise InvalidInput(
            f"A share of experts must lie in (0, 1], got {keep}. Say 0.5 for half of them.", param="keep"
        )
    # Half an expert rounds up: Python's round would send 12.5 and 13.5 in different directions.
    return min(experts, max(top_k, math.floor(keep * experts + 0.5)))


def uniform(scores: F64, keep: float, top_k: int) -> Selection:
    """The same number in every layer, the best by score; among equals the lower id. `scores` is f64 `[L, E]`."""
    if not np.isfinite(scores).all():
        layer = int(np.argwhere(~np.isfinite(scores))[0, 0])
        raise InvalidInput(
            f"The scores of layer {layer} are not finite, so no expert can be preferred. Profile again in float32."
        )
    count = kept(scores.shape[1], keep, top_k)
    order = np.argsort(-scores, axis=1, kind="stable")  # [L, E]  stable: the lower id wins a tie
    return Selection.of(order[:, :count].tolist())
