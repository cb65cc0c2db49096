"""Records which experts each forward of a request needs: a prompt's all at once, then one token after the other.

T tokens, k experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cache_policies import Request, Step
from engine.engine import Engine
from profiler.batches import Encoded, encode_corpus
from profiler.corpus import Corpus
from store.records import ExpertKey


class _Indices:
    """An observer that keeps every layer's chosen experts."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []  # i64 [T, k] each

    def residual(self, layer: int, h: Tensor) -> None:
        """Not needed."""

    def routed(self, layer: int, x: Tensor, logits: Tensor, weights: Tensor, index: Tensor, valid: Tensor) -> None:
        self.layers.append(index[valid].cpu())

    def experts(self, layer: int, experts: Tensor, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None:
        """Not needed."""

    def combined(self, layer: int, y: Tensor) -> None:
        """Not needed."""


def record(engine: Engine, task: str, items: Corpus) -> list[Request]:
    """The routing of each item's prompt and response, every expert reachable, as if it were generated."""
    return [_request(engine, task, one) for one in encode_corpus(engine, items)]


def _request(engine: Engine, task: str, one: Encoded) -> Request:
    """Causal routing does not depend on later tokens, so one pass gives what token-by-token decoding would need."""
    ids = torch.tensor([one.tokens])  # [1, T]
    seen = _Indices()
    engine.forward(ids, torch.ones_like(ids), [None], seen)
    chosen = torch.stack(seen.layers).tolist()  # [L, T, k]
    prompt = len(one.prompt)
    steps: list[Step] = [_distinct(layer, rows[:prompt]) for layer, rows in enumerate(chosen)]
    for token in range(prompt, len(one.tokens)):
        steps += [_distinct(layer, [rows[token]]) for layer, rows in enumerate(chosen)]
    return Request(task, tuple(steps))


def _distinct(layer: int, rows: list[list[int]]) -> Step:
    return tuple(ExpertKey(layer, expert) for expert in sorted({expert for row in rows for expert in row}))
