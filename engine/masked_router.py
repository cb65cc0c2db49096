"""One router's choice from logits that are there already, each token among its own experts. Knows one layer.

The unrestricted router's logits are computed anyway, for coverage. What a router does after them (softmax, top-k,
scaling) is its own code: it is run once more on a copy whose weights are the identity, on logits in which forbidden
experts are hopeless. So a batch of many selections costs one call, where sliced routers cost one a selection.

T tokens, E experts, k experts a token, H hidden.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from engine.restriction import Route, call_router, groups_of, restrict
from engine.top_k import choosing
from store.errors import UnsupportedFamily

TRIALS = 8  # tokens


class MaskedRouter:
    """`MaskedRouter.of` says whether a router's choice can be had this way."""

    def __init__(self, router: Any, dtype: torch.dtype) -> None:
        self._router = _with_identity(router, dtype)
        self._experts = int(router.num_experts)
        self._hopeless = torch.finfo(dtype).min / 4  # finite, for the identity multiplies it by zero

    @classmethod
    def of(cls, router: Any, forward: Route, hidden: int) -> MaskedRouter | None:
        """None unless the logits alone decide, and choices agree with the router's own and with its sliced copy's."""
        tensors = [*router.parameters(), *router.buffers()]
        experts = int(router.num_experts)
        if groups_of(router) > 1 or [tensor.shape for tensor in tensors] != [(experts, hidden)]:
            return None
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(TRIALS, hidden, generator=generator).to(tensors[0])  # [T, H]
        logits, *free = forward(x)
        forbidden = torch.rand(experts, generator=generator).argsort() >= (experts + free[1].shape[1]) // 2  # [E]
        forbidden = forbidden.to(x.device)
        try:
            masked = cls(router, logits.dtype)
            ours = masked(logits, torch.zeros_like(forbidden)), masked(logits, forbidden)
            sliced = restrict(router, (~forbidden).nonzero().flatten().tolist()).route(x, logits)
        except (RuntimeError, TypeError, AttributeError, UnsupportedFamily):
            return None  # it does more with its input than a product: sliced copies serve it
        agree = _same(ours[0], (free[0], free[1]), logits) and _same(ours[1], sliced, logits)
        return masked if agree else None

    def choosing(self, count: int) -> MaskedRouter:
        """One that chooses `count` experts a token."""
        other = copy.copy(self)
        other._router = choosing(self._router, count)
        return other

    def __call__(self, logits: Tensor, forbidden: Tensor) -> tuple[Tensor, Tensor]:
        """`logits` [T, E], `forbidden` bool [T, E] or [E] -> weights and index [T, k].

        An expert so far behind the best that its weight is nothing may lose to a forbidden one. Nobody gets that
        choice: its index is E, its weight is nothing too.
        """
        _, weights, index = call_router(self._router, logits.masked_fill(forbidden, self._hopeless))
        barred = forbidden.expand_as(logits).gather(1, index)  # [T, k]
        return weights, index.masked_fill(barred, self._experts)


def _with_identity(router: Any, dtype: torch.dtype) -> Any:
    """A copy of the router that takes logits [T, E] for hidden states."""
    experts = int(router.num_experts)
    [(owner, name, weight)] = [
        (module, name, tensor)
        for module in router.modules()
        for name, tensor in module._parameters.items()
        if tensor is not None  # a linear layer without bias has a name for it
    ]
    if owner is not router:
        raise UnsupportedFamily(f"{type(router).__name__} keeps its weights in a module of its own.")
    turned = copy.copy(router)
    turned.__dict__ = dict(router.__dict__)
    turned.__dict__.pop("forward", None)  # the wrapper that routing put on this instance
    identity = torch.eye(experts, dtype=dtype, device=weight.device)  # [E, E]
    turned._parameters = {name: nn.Parameter(identity, requires_grad=False)}
    for field, value in router.__dict__.items():
        if type(value) is int and value == weight.shape[1] and ("hidden" in field or "dim" in field):
            turned.__dict__[field] = experts
    return turned


def _same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], logits: Tensor) -> bool:
    """Whether two choices agree: in the logits of what they chose, for of two experts that tie either may be taken."""
    mine, other = (logits.gather(1, index).float().sort(-1).values for _, index in (ours, theirs))  # [T, k] each
    given, wanted = (weights.float().sort(-1).values for weights, _ in (ours, theirs))  # [T, k] each
    return torch.allclose(mine, other, rtol=0.02, atol=0.02) and torch.allclose(given, wanted, rtol=0.02, atol=0.01)
