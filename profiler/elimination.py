"""Which experts a layer can do without, tried out: drop one, re-route, compare the layer's output, and again (NAEE).

Looks at a sample of tokens, since every expert has to run on all of them. m tokens, E experts, K = top_k, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.engine import Engine
from profiler.batches import Encoded
from profiler.finite import require_finite_outputs
from profiler.sample import Route, combine, layer_by_layer
from profiler.statistics import RESPONSE
from profiler.unfinished import NOWHERE, Unfinished
from store.records import F64


def eliminations(
    engine: Engine, text: Sequence[Encoded], rows: int, role: int | None = None, kept: Unfinished = NOWHERE
) -> F64:
    """`order` for every layer, f64 `[L, E]`, on tokens spread evenly over the text, or over those of one role."""
    return layer_by_layer(engine, text, rows, lambda layer: order(*layer), kept, role)


def answer_eliminations(engine: Engine, text: Sequence[Encoded], rows: int, kept: Unfinished = NOWHERE) -> F64:
    """The same over response tokens alone; over all of a text that has none."""
    return eliminations(engine, text, rows, RESPONSE if any(one.response for one in text) else None, kept)


def order(outputs: Tensor, weights: Tensor, index: Tensor, route: Route) -> F64:
    """Greedy backward elimination: f64 `[E]`, higher is dropped later; K experts stay and share the highest value.

    `outputs` [m, E, H]; `weights`, `index` [m, K] as the whole layer routes. The value of an expert is the squared
    error of the layer's output, as a share of the output, once it and all before it are gone (and a hair more a step).
    Raises CheckpointError for outputs that are not finite.
    """
    require_finite_outputs(outputs)
    experts, top_k = outputs.shape[1], index.shape[1]
    target = combine(outputs, weights, index)  # [m, H]
    scale = float(target.square().sum()) or 1.0
    loss = torch.zeros(len(outputs), dtype=torch.float64, device=outputs.device)  # [m]
    alive, lost, found = list(range(experts)), 0.0, np.zeros(experts)
    index = index.clone()
    for step in range(experts - top_k):
        tried = [_without(expert, alive, outputs, target, loss, index, route) for expert in alive]
        best = min(range(len(alive)), key=lambda at: (tried[at][0], alive[at]))
        total, hit, again, errors = tried[best]
        index[hit], loss[hit] = again, errors
        lost = max(lost, total / scale)
        found[alive.pop(best)] = lost + 1e-9 * step
    found[alive] = lost + 1e-9 * experts if experts > top_k else 1.0
    return found


def _without(
    expert: int, alive: Sequence[int], outputs: Tensor, target: Tensor, loss: Tensor, index: Tensor, route: Route
) -> tuple[float, Tensor, Tensor, Tensor]:
    """The sample's error without `expert`; and which tokens that leaves to others, their index and their errors."""
    hit = (index == expert).any(dim=1).nonzero().squeeze(1)  # [n]
    if not len(hit):
        return float(loss.sum()), hit, index[hit], loss[hit]
    weights, again = route(hit, [other for other in alive if other != expert])  # [n, K], [n, K]
    errors = (combine(outputs[hit], weights, again) - target[hit]).square().sum(dim=1)  # [n]
    return float(loss.sum() - loss[hit].sum() + errors.sum()), hit, again, errors
