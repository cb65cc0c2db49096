"""Weights in four bits become the serving dtype, exactly: for whoever multiplies them otherwise than engine.products.

N rows, K columns, 32 neighbours of a row sharing a power of two (store/four_bits.py). Source: OCP Microscaling Formats
(MX) Specification 1.0, sections 5.3.3 and 5.4.1.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from engine.products import DTYPES, Products, instruction_sets
from store.errors import InvalidInput
from store.four_bits import GROUP

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; the fourth bit is the sign
BIAS = 127
NO_NUMBER = 255  # in place of an exponent
STRIP = 1 << 18  # numbers that are unpacked together where that takes memory of its own
LARGEST_POWER = 2  # of two, in 6.0
POWERS = (2 - BIAS, 251 - BIAS)  # of scales that are chosen here: what they multiply stays far from both ends
EXPONENT = 0x7F800000  # the bits of a float32 that are its exponent


class Unpacked:
    """Memory for the matrices of one expert, made at first use and used again by the next."""

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def matrix(self, number: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The same memory for the same `number`."""
        held = self._held.get(number)
        if held is None:
            held = self._held[number] = torch.empty(shape, dtype=dtype, device=device)
        return held


def unpack(blocks: Tensor, scales: Tensor, target: Tensor) -> None:
    """`blocks` u8 [N, K / 2] x `scales` u8 [N, K / 32] -> `target` [N, K], in one piece each."""
    if target.is_cpu and target.dtype in DTYPES and (own := _own()) is not None:
        own.unpack(blocks, scales, target)
    else:
        unpack_plainly(blocks, scales, target)


def unpack_plainly(blocks: Tensor, scales: Tensor, target: Tensor) -> None:
    """The same in torch's operations, on any device, a few rows at a time: some twelve bytes a number of STRIP."""
    rows, columns = target.shape
    step = max(1, STRIP // columns)
    for first in range(0, rows, step):
        strip = slice(first, first + step)
        _unpack_strip(blocks[strip], scales[strip], target[strip])


def _unpack_strip(blocks: Tensor, scales: Tensor, target: Tensor) -> None:
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).int().view(*scales.shape, GROUP)  # [n, K / 32, 32]
    powers = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - BIAS)  # f32 [n, K / 32]
    powers = powers.masked_fill(scales == NO_NUMBER, torch.nan)
    values = _values(blocks.device)[codes] * powers.unsqueeze(-1)  # [n, K / 32, 32]
    target.copy_(values.view(target.shape))


@cache
def _own() -> Products | None:
    names = instruction_sets()
    return Products(next(iter(names))) if names else None


@cache
def _codes(device: torch.device) -> Tensor:
    """The code of each magnitude by twice that, u8 [13]."""
    table = torch.zeros(int(2 * VALUES[-1]) + 1, dtype=torch.uint8)
    for code, value in enumerate(VALUES):
        table[int(2 * value)] = code
    return table.to(device)


@cache
def _values(device: torch.device) -> Tensor:
    """What each code stands for, f32 [16]."""
    return torch.tensor([*VALUES, *(-value for value in VALUES)], device=device)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [..., N, K] -> blocks u8 [..., N, K / 2] and scales u8 [..., N, K / 32], to the nearest, ties to even.

    Of each group's two powers of two that may be best, the largest number's own and the next, at which it is not cut
    off, the one with the smaller sum of squared errors. Raises InvalidInput for K that is no multiple of 32.
    """
    require_groups(weight.shape[-1])
    groups = weight.float().contiguous().view(*weight.shape[:-1], -1, GROUP)  # [..., N, K / 32, 32]
    size = groups.abs()
    own = size.amax(-1).log2().floor() - LARGEST_POWER  # [..., N, K / 32]; of zeros alone -inf
    tries = [_rounded(size, (own + more).clamp(*POWERS)) for more in (0, 1)]
    better = tries[1].error < tries[0].error  # [..., N, K / 32]
    found = torch.where(better.unsqueeze(-1), tries[1].found, tries[0].found)  # [..., 32]
    codes = _codes(groups.device)[found.mul_(2).to(torch.uint8).int()].flatten(-2)  # [..., N, K]
    codes |= groups.signbit().to(torch.uint8).flatten(-2) << 3
    power = tries[1].power.where(better, tries[0].power)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (power + BIAS).to(torch.uint8)


def as_stored(name: str, blocks: Tensor, scales: Tensor, *, published: bool) -> dict[str, Tensor]:
    """What `quantise` gives of the matrix `name`, under the names and in the shapes that it is stored in: gpt-oss's
    where `published`, else compressed-tensors'."""
    if published:
        return {f"{name}_blocks": blocks.reshape(*scales.shape, GROUP // 2), f"{name}_scales": scales}
    return {f"{name}_packed": blocks, f"{name}_scale": scales}


class _Rounded(NamedTuple):
    """Magnitudes [..., 32] in units of 2 to the `power` of their group, and the sum of squared errors, [...] each."""

    found: Tensor
    power: Tensor
    error: Tensor


def _rounded(size: Tensor, power: Tensor) -> _Rounded:
    """`size` [..., 32], none of them negative. Numbers below 2 are 0.5 apart, below 4 they are 1, above that 2."""
    scaled = size * torch.ldexp(torch.ones_like(power), -power.int()).unsqueeze(-1)
    binade = (scaled.view(torch.int32) & EXPONENT).view(torch.float32)  # the power of two that is no larger
    apart = binade.clamp_(1, 4).mul_(0.5)
    found = (scaled / apart).round_().mul_(apart).clamp_(max=VALUES[-1])
    error = torch.ldexp((found - scaled).square_().sum(-1), 2 * power.int())
    return _Rounded(found, power, error)


def require_groups(columns: int) -> None:
    """Raises InvalidInput for a row of so many weights that is no whole number of groups."""
    if columns % GROUP:
        raise InvalidInput(
            f"A row of {columns} weights is no whole number of groups of {GROUP}, which share an exponent in MXFP4. "
            "Leave this model in its own type.",
            param="format",
        )
