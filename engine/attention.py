"""Attention of one new token a row over the cache, by engine.products; of more, and wherever it can't be, by torch.

torch's attention of a single query reads a bfloat16 cache at 2 GB/s, a tenth of what memory gives. Ours is registered
with transformers under a name, as its own kinds are.
B rows, A heads, S columns of the cache, D the width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from engine.products import Products, attends

IMPLEMENTATION = "moepager"
PLAIN = "sdpa"  # torch's, which transformers chooses unless a family needs another: only then is ours the same
OWN = "moepager_products"  # the attribute of a module that attends with them


def adopt_attention(model: Any, own: Products) -> None:
    """Every attention of `model` that would be torch's takes `own` for single tokens."""
    if model.config._attn_implementation != PLAIN:
        return
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    for module in model.modules():
        if "Attention" in type(module).__name__:
            setattr(module, OWN, own)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """`query` [B, A, new, D], `key` and `value` [B, N, S, D] -> [B, new, A, D]; transformers calls every kind so."""
    own: Products | None = getattr(module, OWN, None)
    if own is None or position_bias is not None or not attends(query, key, value, attention_mask):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, position_bias=position_bias, **named
        )
        return found
    mask = None if attention_mask is None else attention_mask[:, 0, 0]  # [B or 1, S]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return own.attend(query[:, :, 0], key, value, mask, scale).unsqueeze(1), None
