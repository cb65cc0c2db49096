"""Weights as they are stored become weights as they are served: another float, or FP8 times the scales of its blocks.

In one call of engine.products where that can, else by torch: the same bits, but for those of what is no number. N rows,
K columns, in blocks of n x k that share a scale.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from engine.fp8 import Scratch, dequantise
from engine.products import Products, converts, instruction_sets


def needs_scratch(served: torch.dtype, *, on_host: bool) -> bool:
    """Whether FP8 weights are worked on in an `engine.fp8.Scratch` before they are there."""
    return not (on_host and converts(torch.float8_e4m3fn, served))


def convert(stored: Tensor, target: Tensor) -> None:
    """`stored`, in one piece, into `target` of the same shape and of any floating dtype."""
    if stored.dim() <= 2 and stored.numel() and _is_ours(stored, target):
        _own().convert(_matrix(stored), _matrix(target))
    else:
        target.copy_(stored)


def convert_fp8(
    stored: Tensor, scales: Tensor, block: tuple[int, int], target: Tensor, scratch: Scratch | None = None
) -> None:
    """`stored` FP8 [..., N, K], in one piece, x `scales` [..., ceil(N / n), ceil(K / k)] -> `target` [..., N, K]."""
    if not _is_ours(stored, target):
        dequantise(stored, scales, block, target, scratch)
    elif stored.dim() == 2:
        _own().convert(stored, target, scales.contiguous(), block)
    else:
        for one, its_scales, its_target in zip(stored, scales, target, strict=True):
            convert_fp8(one, its_scales, block, its_target)


def _is_ours(stored: Tensor, target: Tensor) -> bool:
    return stored.is_cpu and target.is_cpu and stored.is_contiguous() and converts(stored.dtype, target.dtype)


def _matrix(tensor: Tensor) -> Tensor:
    """A vector, or a single number, as the only row [1, K]."""
    while tensor.dim() < 2:
        tensor = tensor.unsqueeze(0)
    return tensor


@cache
def _own() -> Products:
    return Products(next(iter(instruction_sets())))
