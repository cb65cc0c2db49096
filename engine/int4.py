"""Weights rounded to integers of four bits, 32 neighbours of a row sharing a scale in bfloat16.

Symmetric, without zero points. N rows, K columns. The scale that puts a group's largest number on -8 or 7 is not the
best one: of a few smaller, which cut it off, the one with the least squared error is taken, as llama.cpp's and AWQ's
searches do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.mxfp4 import require_groups
from engine.unpacking import ZERO
from store.quantisation import GROUP

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of the scale at which nothing is cut off
LEAST = 2.0**-100  # of a scale: products with it stay numbers


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [..., N, K] -> i32 [..., N, K / 8] and scales bf16 [..., N, K / 32]. Raises InvalidInput for K that is
    no multiple of 32."""
    require_groups(weight.shape[-1])
    groups = weight.float().contiguous().view(*weight.shape[:-1], -1, GROUP)  # [..., N, K / 32, 32]
    whole = torch.maximum(groups.amax(-1) / 7, groups.amin(-1) / -8).clamp(min=LEAST)  # [..., N, K / 32]
    best_scale, best_error = whole.bfloat16(), torch.full_like(whole, torch.inf)
    found = torch.zeros_like(groups)
    for share in SHRINK:
        scale = (whole * share).bfloat16()
        integers = (groups / scale.float().unsqueeze(-1)).round_().clamp_(-ZERO, 7)
        error = (integers * scale.float().unsqueeze(-1) - groups).square_().sum(-1)
        better = error < best_error
        best_scale, best_error = scale.where(better, best_scale), error.where(better, best_error)
        found = integers.where(better.unsqueeze(-1), found)
    codes = (found + ZERO).to(torch.uint8).flatten(-2)  # [..., N, K]
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    return pairs.contiguous().view(torch.int32), best_scale
