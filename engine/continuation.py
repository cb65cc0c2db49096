"""Whether a model with running states goes on from them: tried once, with the weights it serves.

A family may take many tokens at once only where there is nothing before them, and forget what was there without a word
(Jamba's does, in transformers 5.23). Then prompts go on a token at a time. One that forgets even then is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from engine.attention import TOLERANCE
from engine.kvcache import KvPool
from engine.layer_block import forward_of, nothing
from engine.skeleton import Joint
from store.errors import UnsupportedFamily

TOKENS = 4  # of the trial: two and two, and one by one, against all at once


def goes_on(model: Any, joints: Sequence[Joint], pool: KvPool) -> bool:
    """Whether several tokens may follow others in a pass of their own. Experts are left out: nothing is read.

    Raises UnsupportedFamily where not even single ones may.
    """
    with pool.lend(), torch.inference_mode(), ExitStack() as stack:
        for joint in joints:
            stack.enter_context(forward_of(joint.experts, nothing))
        whole, halves, singles = (_states(model, pool, size) for size in (TOKENS, TOKENS // 2, 1))
    if not _alike(singles, whole, model.dtype):
        raise UnsupportedFamily(
            f"{type(model).__name__} does not go on from the running states that it left: a token by itself leaves "
            "others than the same token among those before it, so answers would be wrong."
        )
    return _alike(halves, whole, model.dtype)


def _alike(found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """But for rounding in `dtype`, which states that are kept in float32 show as well."""
    apart = TOLERANCE[torch.bfloat16 if dtype.itemsize == 2 else torch.float32]
    return all(
        bool((ours - theirs).abs().max() <= apart * theirs.abs().max())
        for ours, theirs in zip(found, wanted, strict=True)
    )


def _states(model: Any, pool: KvPool, size: int) -> list[Tensor]:
    """Of the first layer that has any, after some tokens went through, `size` at a time."""
    cache = pool.window(0, 1)
    for start in range(0, TOKENS, size):
        ids = torch.arange(1 + start, 1 + start + size, device=pool.device).unsqueeze(0)  # [1, size]
        mask = torch.ones(1, start + size, dtype=torch.long, device=pool.device)
        with cache.passing(mask[:, -size:]):
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=ids - 1,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
    return cache.running_states()
