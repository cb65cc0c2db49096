"""Which experts a layer can do without, tried out: drop one, re-route, compare the layer's output, and again (NAEE).

Looks at a sample of tokens, since every expert has to run on all of them. m tokens, E experts, K = top_k, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.engine import Engine
from profiler.batches import Encoded, cut, pad
from store.records import F64

TOKENS = 256
OUTPUT_BYTES = 256 << 20  # of all experts on all sampled tokens, one layer at a time

Route = Callable[[Tensor, Sequence[int]], tuple[Tensor, Tensor]]  # tokens i64 [n], experts -> weights, index [n, K]


def eliminations(engine: Engine, text: Sequence[Encoded], rows: int) -> F64:
    """`order` for every layer, f64 `[L, E]`, on tokens spread evenly over the text."""
    sample = sample_routing(engine, text, rows)
    return np.stack([_of_layer(engine, layer, sample(layer)) for layer in range(engine.card.layers)])


def sample_routing(engine: Engine, text: Sequence[Encoded], rows: int) -> Callable[[int], tuple[Tensor, ...]]:
    """For each layer x [m, H], logits [m, E], weights [m, K] and index [m, K] of tokens spread evenly over the text, so
    many that the outputs of all experts on them are of a bearable size.
    """
    card = engine.card
    count = max(32, min(TOKENS, OUTPUT_BYTES // (4 * card.experts * card.hidden)))
    sample = _Sample(card.layers)
    for part in cut(engine, _spread(text, count), rows):
        batch = pad(part)
        engine.forward(batch.ids, batch.mask, [None] * len(part), sample)
    return lambda layer: sample.layer(layer, count)


def order(outputs: Tensor, weights: Tensor, index: Tensor, route: Route) -> F64:
    """Greedy backward elimination: f64 `[E]`, higher is dropped later; K experts stay and share the highest value.

    `outputs` [m, E, H]; `weights`, `index` [m, K] as the whole layer routes. The value of an expert is the squared
    error of the layer's output, as a share of the output, once it and all before it are gone (and a hair more a step).
    """
    experts, top_k = outputs.shape[1], index.shape[1]
    target = _combine(outputs, weights, index)  # [m, H]
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
    errors = (_combine(outputs[hit], weights, again) - target[hit]).square().sum(dim=1)  # [n]
    return float(loss.sum() - loss[hit].sum() + errors.sum()), hit, again, errors


def _combine(outputs: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """`outputs` [n, E, H], `weights`, `index` [n, K] -> f64 [n, H]."""
    chosen = outputs.gather(1, index[:, :, None].expand(-1, -1, outputs.shape[2]))  # [n, K, H]
    return (chosen.to(torch.float64) * weights[:, :, None].to(torch.float64)).sum(dim=1)


def _of_layer(engine: Engine, layer: int, seen: tuple[Tensor, ...]) -> F64:
    x, logits, weights, index = seen

    def route(tokens: Tensor, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
        return engine.route_within(layer, x[tokens], logits[tokens], experts)

    return order(engine.expert_outputs(layer, x), weights, index, route)


def _spread(text: Sequence[Encoded], tokens: int) -> list[Encoded]:
    """Items with at least twice as many tokens as are wanted, spread evenly over the corpus; all if there are fewer."""
    items = sorted(text, key=lambda one: one.number)
    wanted = 2 * tokens
    mean = sum(len(one.tokens) for one in items) / len(items)
    count = min(len(items), max(1, round(wanted / mean)))
    picked = [items[at * len(items) // count] for at in range(count)]
    return sorted(picked, key=lambda one: (len(one.tokens), one.number))


class _Sample:
    """An observer that keeps what every layer's router saw and said, padding left out."""

    def __init__(self, layers: int) -> None:
        self._seen: list[list[tuple[Tensor, ...]]] = [[] for _ in range(layers)]

    def layer(self, layer: int, count: int) -> tuple[Tensor, ...]:
        """x [m, H], logits [m, E], weights [m, K], index [m, K] of at most `count` tokens, evenly spread."""
        x, logits, weights, index = (torch.cat(each) for each in zip(*self._seen[layer], strict=True))
        take = torch.arange(min(count, len(x))) * len(x) // min(count, len(x))  # [m]
        return x[take], logits[take], weights[take], index[take].long()

    def routed(self, layer: int, x: Tensor, logits: Tensor, weights: Tensor, index: Tensor, valid: Tensor) -> None:
        self._seen[layer].append((x[valid], logits[valid], weights[valid], index[valid]))

    def residual(self, layer: int, h: Tensor) -> None:
        pass

    def expert(self, layer: int, expert: int, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None:
        pass

    def combined(self, layer: int, y: Tensor) -> None:
        pass
