"""FP8 weights become the serving dtype: value x the scale of its block. Knows no files and no slots.

N rows, K columns, in blocks of n x k that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dequantise(stored: Tensor, scales: Tensor, block: tuple[int, int], target: Tensor) -> None:
    """`stored` FP8 [N, K] x `scales` [ceil(N / n), ceil(K / k)] -> `target` [N, K], rounded once.

    One row of blocks at a time, in float32, which needs what store.block_scales.scratch_bytes says. Leading dimensions
    are taken one by one.
    """
    if stored.dim() > 2:
        for one, its_scales, its_target in zip(stored, scales, target, strict=True):
            dequantise(one, its_scales, block, its_target)
        return
    rows, columns = block
    for at, row in enumerate(scales.float()):  # [K / k]
        wide = row.repeat_interleave(columns)[: stored.shape[1]]  # [K]
        part = slice(at * rows, (at + 1) * rows)
        values = stored[part].to(torch.float32)  # [n, K]
        target[part].copy_(values.mul_(wide))
