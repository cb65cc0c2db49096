"""FP8 weights become the serving dtype: value x the scale of its block. Knows no files and no slots.

N rows, K columns, in blocks of n x k that share a scale; m rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from store.block_scales import STRIP


def dequantise(stored: Tensor, scales: Tensor, block: tuple[int, int], target: Tensor) -> None:
    """`stored` FP8 [N, K] x `scales` [ceil(N / n), ceil(K / k)] -> `target` [N, K], rounded once.

    A few rows at a time, in float32, which needs what store.block_scales.scratch_bytes says. Leading dimensions
    are taken one by one.
    """
    if stored.dim() > 2:
        for one, its_scales, its_target in zip(stored, scales, target, strict=True):
            dequantise(one, its_scales, block, its_target)
        return
    rows, columns = block
    meanings = _meanings(stored.device)
    for at, row in enumerate(scales.float()):  # [K / k]
        wide = row.repeat_interleave(columns)[: stored.shape[1]]  # [K]
        for strip in _strips(at * rows, min((at + 1) * rows, len(stored))):
            codes = stored[strip].view(torch.uint8).int()  # [m, K]
            values = torch.index_select(meanings, 0, codes.flatten()).view_as(codes)  # [m, K]
            target[strip].copy_(values.mul_(wide))


def _strips(start: int, end: int) -> Iterator[slice]:
    """Few rows at a time: what they need stays in the processor's cache, and is not asked of the system anew."""
    for first in range(start, end, STRIP):
        yield slice(first, min(first + STRIP, end))


@cache
def _meanings(device: torch.device) -> Tensor:
    """What each byte stands for, f32 [256]: looking it up takes a quarter of the time of torch's own cast on a CPU."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)
