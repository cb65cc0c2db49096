"""The routed experts' forward over the bank's slots, registered in transformers' experts dispatch as "moepager".

One F.linear per expert that was hit, over views of its slot: weights are never gathered. Each family's own activation,
biases and orientation come from its module. T tokens, k experts a token, H hidden, n tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from engine.bank import Bank
from engine.layout import SlotLayout
from engine.observer import Observer
from store.errors import UnsupportedFamily

IMPLEMENTATION = "moepager"
CONTRACT = ("has_gate", "has_bias", "is_transposed", "num_experts")

FeedForward = Callable[[Tensor, Sequence[Tensor]], Tensor]


class PagedExperts:
    """One layer's experts: asks the bank for those that were hit and runs them."""

    def __init__(self, layer: int, module: Any, bank: Bank) -> None:
        self.layer = layer
        self.observer: Observer | None = None
        self._bank = bank
        self._experts = int(module.num_experts)
        self._feed_forward = feed_forward(module, bank.layout)

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """`hidden` [T, H], `index` and `weights` [T, k] -> [T, H]. An index of E marks padding: no expert sees it."""
        top_k = index.shape[1]
        flat = index.reshape(-1)  # [T*k]
        order = flat.argsort(stable=True)  # [T*k]
        counts = torch.bincount(flat, minlength=self._experts).tolist()[: self._experts]
        hit = [expert for expert, count in enumerate(counts) if count]
        sizes = [counts[expert] for expert in hit]
        routed = order[: sum(sizes)]  # padding sorts last
        tokens = routed // top_k  # [n_all]
        scale = weights.reshape(-1, 1)[routed]  # [n_all, 1]
        inputs = hidden[tokens]  # [n_all, H]
        outputs = inputs.new_empty(inputs.shape, dtype=torch.promote_types(inputs.dtype, scale.dtype))
        pieces = zip(*(torch.split(tensor, sizes) for tensor in (inputs, scale, outputs)), strict=True)
        places = dict(zip(hit, pieces, strict=True))
        views, feed_forward = self._bank.views, self._feed_forward
        visit = self._bank.visit(self.layer, hit)
        try:
            for expert, slot in visit:
                x, w, out = places[expert]
                y = feed_forward(x, views[slot])  # [n, H]
                if self.observer is not None:
                    start = sum(counts[:expert])
                    self.observer.expert(self.layer, expert, tokens[start : start + len(x)], w.squeeze(1), y)
                torch.mul(y, w, out=out)
        finally:
            visit.close()  # an error must not leave the visit's slots pinned until its traceback is gone
        return self._combine(outputs, routed, index.shape, hidden.dtype)

    def _combine(self, outputs: Tensor, routed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Sum over k in the router's order, whatever order the experts ran in: residency never changes an answer."""
        tokens, top_k = shape
        places = outputs.new_zeros(tokens * top_k, outputs.shape[1]).index_copy_(0, routed, outputs)  # [T*k, H]
        combined = places.view(tokens, top_k, -1).sum(1).to(dtype)  # [T, H]
        if self.observer is not None:
            self.observer.combined(self.layer, combined)
        return combined


def paged_forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """transformers calls this in place of the module's own forward; `bind` has left the layer's PagedExperts there."""
    if hidden.is_meta:
        return torch.empty_like(hidden)  # the shape check at open, before any weight is there
    paged: PagedExperts = module.moepager
    return paged(hidden, index, weights)


def register() -> None:
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, paged_forward)


def drop_parameters(module: nn.Module) -> None:
    """The bank holds the experts' weights: the module's own go, so that nothing allocates them."""
    for name, _ in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, None)


def bind(module: Any, paged: PagedExperts) -> None:
    module.moepager = paged


def feed_forward(module: Any, layout: SlotLayout) -> FeedForward:
    """The module's own arithmetic for one expert. Raises UnsupportedFamily without transformers' experts contract."""
    kind = type(module).__name__
    if lacking := [name for name in CONTRACT if not hasattr(module, name)]:
        raise UnsupportedFamily(f"{kind} lacks {', '.join(lacking)} of transformers' experts contract.")
    names = [parameter.name for parameter in layout.parameters]
    wanted = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    wanted = [name + end for name in wanted for end in (("", "_bias") if module.has_bias else ("",))]
    if names != wanted:
        raise UnsupportedFamily(f"{kind} keeps an expert as {', '.join(names)}; the contract is {', '.join(wanted)}.")
    gate = module._apply_gate if module.has_gate else module.act_fn
    after = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    plain = _biased(gate, module.is_transposed) if module.has_bias else _unbiased(gate, module.is_transposed)
    return plain if after is None else lambda x, views: after(plain(x, views))


def _unbiased(gate: Callable[[Tensor], Tensor], transposed: bool) -> FeedForward:
    if transposed:
        return lambda x, views: gate(x @ views[0]) @ views[1]
    return lambda x, views: F.linear(gate(F.linear(x, views[0])), views[1])


def _biased(gate: Callable[[Tensor], Tensor], transposed: bool) -> FeedForward:
    if transposed:
        return lambda x, views: gate(x @ views[0] + views[1]) @ views[2] + views[3]
    return lambda x, views: F.linear(gate(F.linear(x, views[0], views[1])), views[2], views[3])
