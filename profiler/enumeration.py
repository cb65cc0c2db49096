"""What a layer loses inside every set of experts that could stay, tried out one by one (NAEE as published).

There are 2^E sets, so only where E is small. m tokens, E experts, K = top_k, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch

from engine.engine import Engine
from profiler.batches import Encoded
from profiler.finite import require_finite_outputs
from profiler.sample import LayerSample, combine, layer_by_layer
from profiler.unfinished import NOWHERE, Unfinished
from store.errors import InvalidInput
from store.records import F64

MOST = 8  # experts


def enumerations(engine: Engine, text: Sequence[Encoded], rows: int, kept: Unfinished = NOWHERE) -> F64:
    """`losses` for every layer, f64 `[L, 2^E]`. Raises InvalidInput, before anything runs, where E is too large."""
    check_enumeration(engine.card.experts)
    return layer_by_layer(engine, text, rows, losses, kept)


def check_enumeration(experts: int) -> None:
    if experts > MOST:
        raise InvalidInput(
            f"naee_exact tries every set of experts, which is for at most {MOST} of them; this model has {experts} a "
            "layer. Use naee, which drops one at a time.",
            param="scorer",
        )


def losses(layer: LayerSample) -> F64:
    """|F(X) - F'(X; kept)| for each set, f64 `[2^E]`, over the sample as one batch; bit e of the place: e is kept.

    The router chooses again inside the set. Infinite for sets too small for one token. Raises CheckpointError for
    outputs that are not finite.
    """
    require_finite_outputs(layer.outputs)
    experts, top_k = layer.outputs.shape[1], layer.chosen.shape[1]
    target = combine(layer.outputs, layer.weights, layer.chosen)  # [m, H]
    everyone = torch.arange(len(target), device=target.device)  # [m]
    found = np.full(2**experts, np.inf)
    for size in range(top_k, experts + 1):
        for kept in combinations(range(experts), size):
            weights, index = layer.route(everyone, kept)  # [m, K], [m, K]
            found[place(kept)] = float(torch.linalg.vector_norm(combine(layer.outputs, weights, index) - target))
    return found


def place(kept: Sequence[int]) -> int:
    return sum(1 << expert for expert in kept)
