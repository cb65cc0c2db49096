"""A sample of tokens on which every expert of a layer is run, for what has to be tried out instead of summed up.

m tokens, n of them, E experts, K = top_k, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.engine import Engine
from profiler.batches import Encoded, cut, pad
from profiler.statistics import PROMPT, RESPONSE
from profiler.unfinished import Unfinished
from store.records import F64

TOKENS = 256
OUTPUT_BYTES = 256 << 20  # of all experts on all sampled tokens, one layer at a time

Route = Callable[[Tensor, Sequence[int]], tuple[Tensor, Tensor]]  # tokens i64 [n], experts -> weights, index [n, K]


class LayerSample(NamedTuple):
    """`outputs` [m, E, H]; `weights`, `chosen` [m, K] as the whole layer routes; `route` limits it to some experts."""

    outputs: Tensor
    weights: Tensor
    chosen: Tensor
    route: Route


def sample_routing(
    engine: Engine, text: Sequence[Encoded], rows: int, role: int | None = None
) -> Callable[[int], tuple[Tensor, ...]]:
    """For each layer x [m, H], logits [m, E], weights [m, K] and index [m, K] of tokens spread evenly over the text, so
    many that the outputs of all experts on them are of a bearable size. `role`: of prompts or responses alone.
    """
    card = engine.card
    count = max(32, min(TOKENS, OUTPUT_BYTES // (4 * card.experts * card.hidden)))
    sample = RouterSample(card.layers)
    for part in cut(engine, _spread(text, count, role), rows):
        batch = pad(part)
        sample.begin(torch.ones_like(batch.roles, dtype=torch.bool) if role is None else batch.roles == role)
        engine.forward(batch.ids, batch.mask, [None] * len(part), sample)
    return lambda layer: sample.layer(layer, count)


def on_layers(
    engine: Engine, text: Sequence[Encoded], rows: int, role: int | None = None, since: int = 0
) -> Iterator[LayerSample]:
    """Each MoE layer in turn, on the same tokens; those before `since` are left out."""
    sample = sample_routing(engine, text, rows, role)
    for layer in range(since, engine.card.layers):
        yield _of_layer(engine, layer, sample(layer))


def layer_by_layer(
    engine: Engine,
    text: Sequence[Encoded],
    rows: int,
    judge: Callable[[LayerSample], F64],
    kept: Unfinished,
    role: int | None = None,
) -> F64:
    """What `judge` finds of each layer, f64 `[L, ...]`; a killed run goes on after its last finished layer."""
    before = kept.load()
    found = [] if before is None else list(before["found"])
    if len(found) < engine.card.layers:
        for layer in on_layers(engine, text, rows, role, len(found)):
            found.append(judge(layer))
            kept.save({"found": np.stack(found)})
    return np.stack(found)


def combine(outputs: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """`outputs` [n, E, H], `weights`, `index` [n, K] -> f64 [n, H]."""
    chosen = outputs.gather(1, index[:, :, None].expand(-1, -1, outputs.shape[2]))  # [n, K, H]
    return (chosen.to(torch.float64) * weights[:, :, None].to(torch.float64)).sum(dim=1)


def _of_layer(engine: Engine, layer: int, seen: tuple[Tensor, ...]) -> LayerSample:
    x, logits, weights, index = seen

    def route(tokens: Tensor, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
        return engine.layers.route_within(layer, x[tokens], logits[tokens], experts)

    return LayerSample(engine.layers.expert_outputs(layer, x), weights, index, route)


def _spread(text: Sequence[Encoded], tokens: int, role: int | None) -> list[Encoded]:
    """Items with at least twice as many tokens as are wanted, spread evenly over the corpus; all if there are fewer."""
    items = sorted(text, key=lambda one: one.number)
    wanted = 2 * tokens
    mean = sum(len({None: one.tokens, PROMPT: one.prompt, RESPONSE: one.response}[role]) for one in items) / len(items)
    count = min(len(items), max(1, round(wanted / mean)))
    picked = [items[at * len(items) // count] for at in range(count)]
    return sorted(picked, key=lambda one: (len(one.tokens), one.number))


class RouterSample:
    """An observer that keeps what every layer's router saw and said, padding left out and tokens nobody asked for."""

    def __init__(self, layers: int) -> None:
        self._seen: list[list[tuple[Tensor, ...]]] = [[] for _ in range(layers)]
        self._wanted = torch.empty(0, dtype=torch.bool)

    def begin(self, wanted: Tensor) -> None:
        """Before a forward: which of its tokens, bool [B, S]."""
        self._wanted = wanted.flatten()

    def layer(self, layer: int, count: int | None) -> tuple[Tensor, ...]:
        """x [m, H], logits [m, E], weights [m, K], index [m, K] of `count` tokens at most, evenly spread; None: all."""
        x, logits, weights, index = (torch.cat(each) for each in zip(*self._seen[layer], strict=True))
        most = len(x) if count is None else min(count, len(x))
        take = torch.arange(most) * len(x) // most  # [m]
        return x[take], logits[take], weights[take], index[take].long()

    def routed(self, layer: int, x: Tensor, logits: Tensor, weights: Tensor, index: Tensor, valid: Tensor) -> None:
        taken = valid & self._wanted.to(valid.device)
        self._seen[layer].append((x[taken], logits[taken], weights[taken], index[taken]))

    def residual(self, layer: int, h: Tensor) -> None:
        pass

    def experts(self, layer: int, experts: Tensor, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None:
        pass

    def combined(self, layer: int, y: Tensor) -> None:
        pass
