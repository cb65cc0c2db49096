"""Routers that choose fewer experts a token than their model does: copies whose number is another, by their own code.

What a smaller number does to the weights (renormalised or not) is so what transformers makes of it. T tokens, E
experts, K the model's own number, k a smaller one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from engine.restriction import Route, call_router

NAMES = frozenset({"top_k", "topk", "moe_topk", "num_experts_per_tok"})  # of the number, in transformers' routers
TRIALS = 8  # tokens


def choosing(router: Any, count: int) -> Any:
    """A copy of `router`, with the same tensors, that chooses `count` experts a token."""
    other = copy.copy(router)
    other.__dict__ = dict(router.__dict__)
    other.__dict__.pop("forward", None)  # the wrapper that routing put on this instance
    other.__dict__ |= {name: count for name in NAMES & router.__dict__.keys() if type(router.__dict__[name]) is int}
    return other


def can_choose_fewer(router: Any, forward: Route, hidden: int) -> bool:
    """Whether `choosing` works: tried on random tokens with one expert and with all but one, which have to be among
    those that `forward` gives them. Needs the weights.
    """
    weight = next(router.parameters())
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TRIALS, hidden, generator=generator).to(weight)  # [T, H]
    _, _, whole = forward(x)  # [T, K]
    return all(_chooses(router, x, whole, count) for count in {1, max(1, whole.shape[1] - 1)})


def _chooses(router: Any, x: Tensor, whole: Tensor, count: int) -> bool:
    """Whether a copy of the router gives each token `count` experts, all of them among its `whole` [T, K]."""
    try:
        _, _, index = call_router(choosing(router, count), x)  # [T, k]
    except (RuntimeError, IndexError, TypeError, AttributeError):
        return False
    if tuple(index.shape) != (len(x), count):
        return False
    return bool((index.unsqueeze(2) == whole.unsqueeze(1)).any(2).all())
