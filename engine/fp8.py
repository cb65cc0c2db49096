"""FP8 weights become the serving dtype, value x the scale of its block, and back. Knows no files and no slots.

N rows, K columns, in blocks of n x k that share a scale; m rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

from store.quantised import STRIP

LARGEST = 448.0  # of float8_e4m3fn


class Scratch:
    """What `dequantise` works in: a few rows as numbers of their codes and as values, and the scales of a row."""

    def __init__(self, shapes: Iterable[tuple[int, ...]], device: torch.device) -> None:
        """For weights of `shapes` [..., N, K]."""
        sizes = [shape[-2:] for shape in shapes]
        largest = max(min(rows, STRIP) * columns for rows, columns in sizes)
        self._codes = torch.zeros(largest, dtype=torch.int32, device=device)
        self._values = torch.zeros(largest, device=device)
        self._wide = torch.zeros(max(columns for _, columns in sizes), device=device)

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._values.nbytes + self._wide.nbytes

    def strip(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """For codes i32 and values f32, [rows, columns] each."""
        length = rows * columns
        return self._codes[:length].view(rows, columns), self._values[:length].view(rows, columns)

    def widen(self, scales: Tensor, block: int, columns: int) -> Tensor:
        """`scales` [ceil(columns / block)] -> f32 [columns], each as often as it is used."""
        wide = self._wide[:columns]
        full = columns // block
        wide[: full * block].view(full, block).copy_(scales[:full, None])
        wide[full * block :] = scales[-1]
        return wide


def dequantise(
    stored: Tensor, scales: Tensor, block: tuple[int, int], target: Tensor, scratch: Scratch | None = None
) -> None:
    """`stored` FP8 [N, K] x `scales` [ceil(N / n), ceil(K / k)] -> `target` [N, K], rounded once.

    A few rows at a time, in float32, which needs what store.quantised.scratch_bytes says: in `scratch`, which is
    made here where it is not given. Leading dimensions are taken one by one.
    """
    scratch = scratch or Scratch([tuple(stored.shape)], stored.device)
    if stored.dim() > 2:
        for one, its_scales, its_target in zip(stored, scales, target, strict=True):
            dequantise(one, its_scales, block, its_target, scratch)
        return
    rows, columns = block
    meanings = _meanings(stored.device)
    for at, row in enumerate(scales.float()):  # [K / k]
        wide = scratch.widen(row, columns, stored.shape[1])  # [K]
        for strip in _strips(at * rows, min((at + 1) * rows, len(stored))):
            codes, values = scratch.strip(strip.stop - strip.start, stored.shape[1])  # [m, K]
            codes.copy_(stored[strip].view(torch.uint8))
            torch.index_select(meanings, 0, codes.view(-1), out=values.view(-1))
            target[strip].copy_(values.mul_(wide))


def _strips(start: int, end: int) -> Iterator[slice]:
    """Few rows at a time: what they need stays in the processor's cache, and is not asked of the system anew."""
    for first in range(start, end, STRIP):
        yield slice(first, min(first + STRIP, end))


@cache
def _meanings(device: torch.device) -> Tensor:
    """What each byte stands for, f32 [256]: looking it up takes a quarter of the time of torch's own cast on a CPU."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


def quantise(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`weight` [N, K] -> FP8 [N, K] and f32 scales [ceil(N / n), ceil(K / k)], so that a block's largest is 448."""
    rows, columns = (-(-length // size) for length, size in zip(weight.shape, block, strict=True))
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(rows, columns, device=weight.device)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            values = weight[part].float()  # [n, k]
            scales[i, j] = values.abs().max().clamp(min=1e-12) / LARGEST
            stored[part] = (values / scales[i, j]).to(torch.float8_e4m3fn)
    return stored, scales
