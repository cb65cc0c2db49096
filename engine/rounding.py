"""Weights rounded to one of the ways of quantising, and what they are then called and shaped like in a file."""

from __future__ import annotations

import torch
from torch import Tensor

from engine import fp8, int4, mxfp4
from store.quantisation import BLOCK, FP8, GROUP, INT4, MXFP4
from store.quantised import BLOCK_SCALES, BLOCKS, INVERSE, PACKED, SCALE, SHAPE


def rounded(way: str, weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """Numbers and scales of `weight` [..., N, K], as store/quantised.py has them; `block` is FP8's. Raises InvalidInput
    for rows of MXFP4 or INT4 that are no whole groups."""
    if way == MXFP4:
        return mxfp4.quantise(weight)
    if way == INT4:
        return int4.quantise(weight)
    if weight.dim() == 2:
        return fp8.quantise(weight, block)
    made = [fp8.quantise(matrix, block) for matrix in weight]
    return torch.stack([numbers for numbers, _ in made]), torch.stack([scales for _, scales in made])


def as_stored(way: str, name: str, numbers: Tensor, scales: Tensor, *, published: bool = False) -> dict[str, Tensor]:
    """What `rounded` gives of the matrix `name`, under the names and in the shapes that it is stored in: gpt-oss's
    where `published`, DeepSeek-V3's for FP8, else compressed-tensors'."""
    if way == FP8:
        return {name: numbers, name + INVERSE: scales}
    if published and way == MXFP4:
        return {name + BLOCKS: numbers.reshape(*scales.shape, GROUP // 2), name + BLOCK_SCALES: scales}
    held = {name + PACKED: numbers, name + SCALE: scales}
    if way == INT4:
        held[name + SHAPE] = torch.tensor([numbers.shape[-2], numbers.shape[-1] * 8])
    return held
