"""Quantised weights become the serving dtype: for whoever multiplies them otherwise than engine.products.

N rows, K columns; which numbers share a scale is a Coding's. Each number is rounded once, those of MXFP4 never: they
are bfloat16 numbers. Sources: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1; for the others
store/quantised.py.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from engine.addresses import DTYPES
from engine.fp8 import dequantise
from engine.products import STORED, Products, instruction_sets
from store.quantisation import FP8, INT4, Coding

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of MXFP4's codes 0 to 7; the fourth bit is the sign
BIAS = 127
NO_NUMBER = 255  # in place of an exponent
ZERO = 8  # the code of the integer 0
STRIP = 1 << 18  # numbers that are unpacked together where that takes memory of its own


class Unpacked:
    """Memory for the matrices of one expert, made at first use and used again by the next."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def matrix(self, number: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The same memory for the same `number`."""
        held = self._held.get(number)
        if held is None:
            held = self._held[number] = torch.empty(shape, dtype=dtype, device=device)
        return held


def unpack(coding: Coding, numbers: Tensor, scales: Tensor, target: Tensor, part: int | None = None) -> None:
    """`numbers` u8 [N, bytes of a row] and their `scales` -> `target` [N, K], in one piece each. Every `part` rows, all
    of them where it is not given, were quantised by themselves."""
    part = part or len(target)
    if target.is_cpu and target.dtype in DTYPES and scales.dtype in (*STORED, torch.uint8) and (own := _own()):
        own.unpack(coding, numbers, scales, target, part)
    else:
        unpack_plainly(coding, numbers, scales, target, part)


def unpack_plainly(
    coding: Coding, numbers: Tensor, scales: Tensor, target: Tensor, part: int | None = None
) -> None:  # fmt: skip
    """The same in torch's operations, on any device, a few rows at a time: some twelve bytes a number of STRIP."""
    rows, columns = target.shape
    if coding.way == FP8:
        _eights(coding, numbers.view(torch.float8_e4m3fn), scales, target, part or rows)
        return
    step = max(1, STRIP // columns)
    for first in range(0, rows, step):
        strip = slice(first, first + step)
        _fours(coding, numbers[strip], scales[strip], target[strip])


def _eights(coding: Coding, numbers: Tensor, scales: Tensor, target: Tensor, part: int) -> None:
    count = len(target) // part
    block = coding.block[0], coding.block[1] or target.shape[1]
    pieces = (numbers.view(count, part, -1), scales.view(count, -1, scales.shape[-1]), target.view(count, part, -1))
    dequantise(pieces[0], pieces[1], block, pieces[2])


def _fours(coding: Coding, numbers: Tensor, scales: Tensor, target: Tensor) -> None:
    """`numbers` [n, K / 2], `scales` [n, groups of a row]."""
    codes = torch.stack([numbers & 15, numbers >> 4], dim=-1).int().view(*scales.shape, -1)  # [n, groups, group]
    if coding.way == INT4:
        values, times = (codes - ZERO).float(), scales.float()
    else:
        values, times = _values(numbers.device)[codes], _powers(scales)
    target.copy_((values * times.unsqueeze(-1)).view(target.shape))


def _powers(scales: Tensor) -> Tensor:
    """Two to the exponents u8 [n, groups], f32."""
    powers = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - BIAS)
    return powers.masked_fill(scales == NO_NUMBER, torch.nan)


@cache
def _own() -> Products | None:
    names = instruction_sets()
    return Products(next(iter(names))) if names else None


@cache
def _values(device: torch.device) -> Tensor:
    """What each code stands for, f32 [16]."""
    return torch.tensor([*VALUES, *(-value for value in VALUES)], device=device)
