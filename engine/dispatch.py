"""How transformers comes to call our experts: an implementation of its experts dispatch, by the name of "moepager".

T tokens, k experts a token, H hidden.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "moepager"


class LayerExperts(Protocol):
    """One layer's, as engine.experts has them: called with `hidden` [T, H], `index` and `weights` [T, k] -> [T, H]."""

    layer: int
    added: dict[int, Tensor]  # by layer, [T, H]: what routing adds in place of experts that are left out

    def __call__(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor: ...


def paged_forward(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """transformers calls this in place of the module's own forward; `bind` has left the layer's experts there."""
    if hidden.is_meta:
        return torch.empty_like(hidden)  # the shape check at open, before any weight is there
    paged: LayerExperts = module.moepager
    combined = paged(hidden, index, weights)
    if not paged.added:
        return combined
    return (combined + paged.added.pop(paged.layer)).to(combined.dtype)


def register() -> None:
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, paged_forward)


def drop_parameters(module: nn.Module) -> None:
    """The bank holds the experts' weights: the module's own go, so that nothing allocates them."""
    for name, _ in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, None)


def bind(module: Any, paged: LayerExperts) -> None:
    module.moepager = paged
