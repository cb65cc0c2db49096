"""Weights rounded to MXFP4: four-bit floats, 32 neighbours of a row sharing a power of two.

N rows, K columns. Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3 and 6.3; the choice of the
power is ours.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from engine.unpacking import BIAS, VALUES
from store.errors import InvalidInput
from store.quantisation import GROUP

LARGEST_POWER = 2  # of two, in 6.0
POWERS = (2 - BIAS, 251 - BIAS)  # of scales that are chosen here: what they multiply stays far from both ends
EXPONENT = 0x7F800000  # the bits of a float32 that are its exponent


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


@cache
def _codes(device: torch.device) -> Tensor:
    """The code of each magnitude by twice that, u8 [13]."""
    table = torch.zeros(int(2 * VALUES[-1]) + 1, dtype=torch.uint8)
    for code, value in enumerate(VALUES):
        table[int(2 * value)] = code
    return table.to(device)
