"""A router's choice that is the best of a softmax, as engine.products makes it: what is particular, and the slow truth.

Most routers take the top k of a softmax of their logits, some weigh them anew. Whether one does is found out by trying
it against its own forward; any other keeps its own.
T tokens, E experts, k experts a token, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.addresses import DTYPES
from engine.restriction import Route, call_router, groups_of
from engine.top_k import can_choose_fewer, choosing

SIZES = (0.1, 1.0, 10.0)  # of the inputs of a trial: what caps its logits or adds to them shows it
TRIALS = 8  # tokens of each
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-6}  # of a weight, and of what two logits that tie may differ by


@dataclass(frozen=True, slots=True)
class Choice:
    """The `top_k` largest shares of the softmax of the logits, times `scale`, divided by their sum where they are
    `renormalised`, in `dtype`.
    """

    experts: int
    top_k: int
    renormalised: bool
    scale: float
    dtype: torch.dtype

    @classmethod
    def of(cls, router: Any, forward: Route, hidden: int) -> Choice | None:
        """None unless the router is one product with its only tensor, and `forward` gives what `plain` gives, with
        fewer experts a token too where the router can choose fewer.
        """
        experts, tensors = int(router.num_experts), [*router.parameters(), *router.buffers()]
        if groups_of(router) > 1 or [tuple(tensor.shape) for tensor in tensors] != [(experts, hidden)]:
            return None
        weight = tensors[0]
        if weight.dtype not in DTYPES or not weight.is_cpu or not weight.is_contiguous():
            return None
        made = torch.Generator().manual_seed(5)
        x = torch.cat([torch.randn(TRIALS, hidden, generator=made) * size for size in SIZES]).to(weight.dtype)  # [T, H]
        with torch.inference_mode():
            logits, weights, index = forward(x)
            wanted = F.linear(x, weight)  # [T, E]
            own = logits.dtype == weight.dtype and weights.dtype in DTYPES and _near(logits, wanted)
            found = (each for each in cls._candidates(experts, logits, weights, index))
            choice = next((each for each in found if each._agrees(logits, weights, index)), None) if own else None
            return choice if choice is not None and choice._agrees_with_fewer(router, forward, x) else None

    @classmethod
    def _candidates(cls, experts: int, logits: Tensor, weights: Tensor, index: Tensor) -> Iterator[Choice]:
        for renormalised in (False, True):
            plain = cls(experts, index.shape[1], renormalised, 1.0, weights.dtype)
            scale = weights.float().sum(-1) / plain.plain(logits)[0].float().sum(-1)  # [T]
            near_one = bool((scale - 1).abs().max() < TOLERANCE[weights.dtype])
            yield cls(experts, index.shape[1], renormalised, 1.0 if near_one else float(scale.median()), weights.dtype)

    def plain(
        self, logits: Tensor, forbidden: Tensor | None = None, calls: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`logits` [T, E], `forbidden` bool [T, E] or [E], `calls` i64 [T] -> weights and index [T, k], the likeliest
        first.

        The first of equals is chosen first; where fewer than k are allowed, or `calls` of a token are, the rest is
        nobody's: index E, weight 0.
        """
        wide = logits.float()
        allowed = torch.ones_like(wide, dtype=torch.bool) if forbidden is None else ~forbidden.expand_as(wide)
        shares = wide.masked_fill(~allowed, -torch.inf).softmax(-1)  # [T, E]
        order = shares.masked_fill(~allowed, -1.0).argsort(dim=-1, descending=True, stable=True)  # [T, E]
        index = order[:, : self.top_k]  # [T, k]
        weights, barred = shares.gather(1, index), ~allowed.gather(1, index)  # [T, k]
        if calls is not None:
            barred |= torch.arange(self.top_k) >= calls.unsqueeze(1)
        weights = weights.masked_fill(barred, 0.0)
        if self.renormalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights * self.scale).to(self.dtype), index.masked_fill(barred, self.experts)

    def _agrees_with_fewer(self, router: Any, forward: Route, x: Tensor) -> bool:
        """Whether one expert a token is weighed as k are: one might leave a single weight as it is."""
        if self.top_k == 1 or not can_choose_fewer(router, forward, x.shape[1]):
            return True
        logits, weights, index = call_router(choosing(router, 1), x)
        return replace(self, top_k=1)._agrees(logits, weights, index)

    def _agrees(self, logits: Tensor, weights: Tensor, index: Tensor) -> bool:
        """Logits of what was chosen are compared, not numbers of experts: of two that tie either may be taken."""
        own, chosen = self.plain(logits)
        return _near(logits.gather(1, chosen), logits.gather(1, index)) and _near(own, weights)


def _near(found: Tensor, wanted: Tensor) -> bool:
    near = TOLERANCE[wanted.dtype]
    return torch.allclose(found.float(), wanted.float(), rtol=near, atol=near * float(wanted.float().abs().max()))
