"""Attention of one new token a row over the cache, by engine.products; of more, and wherever it can't be, by torch.

torch's attention of a single query reads a bfloat16 cache at 2 GB/s, a tenth of what memory gives. Ours is registered
with transformers under a name, as its own kinds are. It knows sinks, scores of which nothing comes (gpt-oss): families
that have them attend eagerly, copying the cache for heads that share it; here they do so for prompts alone.
B rows, A heads, N heads of the cache, S columns of it, D the width of a head.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from engine.products import Products, attends

IMPLEMENTATION = "moepager"
PLAIN = "sdpa"  # torch's, which transformers chooses unless a family needs another: only then is ours the same
EAGER = "eager"  # a family's own, in plain operations
OWN = "moepager_products"  # the attribute of a module that attends with them
SINKS = "moepager_sinks"  # the attribute of one that has sinks: f32 [A]
COLUMNS = 7  # of a trial
NAMED = re.compile(r"_attn_implementation\s*(==|!=|in\b|not\s+in\b)")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.04}  # of the largest number


def adopt_attention(model: Any, own: Products) -> None:
    """Every attention of `model`, which has its weights, that would be torch's takes `own` for single tokens, or eager
    with sinks."""
    modules = [module for module in model.modules() if "Attention" in type(module).__name__]
    implementation = model.config._attn_implementation
    if implementation == EAGER and modules and all(_sinks_as_usual(module, own) for module in modules):
        for module in modules:
            setattr(module, SINKS, module.sinks.detach().float())
    elif implementation != PLAIN or any(map(_depends_on_the_name, modules)):
        return
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)
    for module in modules:
        setattr(module, OWN, own)


def _depends_on_the_name(module: Any) -> bool:
    """Whether it has an indexer and asks which implementation attends: what the indexer did not choose is masked only
    for transformers' own."""
    indexed = any("Indexer" in type(child).__name__ for child in module.children())
    return indexed and NAMED.search(inspect.getsource(type(module))) is not None


def _sinks_as_usual(module: Any, own: Products) -> bool:
    """Whether the family's eager attention of one token of two rows, of which the second does not see all columns, is
    ours with the module's sinks."""
    sinks, eager = getattr(module, "sinks", None), _eager_of(module)
    head, shared = getattr(module, "head_dim", None), getattr(module, "num_key_value_groups", None)
    if eager is None or not isinstance(sinks, Tensor) or sinks.dim() != 1 or not isinstance(head, int) or not shared:
        return False
    if sinks.dtype not in TOLERANCE or not sinks.is_cpu:
        return False
    made = torch.Generator().manual_seed(5)
    q = torch.randn(2, len(sinks), 1, head, generator=made).to(sinks.dtype)
    keys, values = torch.randn(2, 2, len(sinks) // shared, COLUMNS, head, generator=made).to(sinks.dtype)
    seen = torch.ones(2, 1, 1, COLUMNS, dtype=torch.bool)
    seen[1, ..., :3] = False
    with torch.inference_mode():
        try:
            wanted = eager(module, q, keys, values, _added(seen, q.dtype), scaling=0.3)[0][:, 0]  # [B, A, D]
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False
        found = own.attend(q[:, :, 0], keys, values, seen[:, 0, 0], 0.3, sinks.float())
    return close_enough(found, wanted)


def close_enough(found: Tensor, wanted: Tensor) -> bool:
    most = float(wanted.float().abs().max())
    return bool((found.float() - wanted.float()).abs().max() <= TOLERANCE[wanted.dtype] * most)


def _eager_of(module: Any) -> Any:
    """The function that a module of transformers attends with where nothing else is asked for."""
    return getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as eager attention takes it: added to scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


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
    own: Products | None = None if position_bias is not None else getattr(module, OWN, None)
    sinks: Tensor | None = getattr(module, SINKS, None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    wide = None if own is None or query.shape[2] == 1 else own.wide
    if wide is not None and getattr(module, "is_causal", True) and wide.attends(query, key, value, attention_mask):
        return wide.attend(query.transpose(1, 2), key, value, attention_mask, scale, sinks), None
    if own is None or not attends(query, key, value, attention_mask):
        if sinks is not None:
            return _eagerly(module, query, key, value, attention_mask, scaling=scaling, **named)
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, position_bias=position_bias, **named
        )
        return found
    mask = None if attention_mask is None else attention_mask[:, 0, 0]  # [B or 1, S]
    return own.attend(query[:, :, 0], key, value, mask, scale, sinks).unsqueeze(1), None


def _eagerly(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """As the family does it; no mask means that a token sees those before it."""
    if mask is None:
        new, columns = query.shape[2], key.shape[2]
        mask = torch.ones(new, columns, dtype=torch.bool, device=query.device).tril(columns - new)[None, None]
    found: Tensor = _eager_of(module)(module, query, key, value, _added(mask, query.dtype), **named)[0]
    return found, None
