"""Matrix products with few different shapes, for the CPU in 16 bits, where oneDNN compiles a kernel for every shape.

Such a kernel takes about a megabyte that is not given back, and a fifth of a millisecond; every prompt length and every
number of tokens that an expert gets would be another. So rows are padded to powers of two, which costs next to nothing.
M rows, K columns, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMPILED = frozenset({torch.bfloat16, torch.float16})


def pad_rows(x: Tensor) -> Tensor:
    """`x` [M, K] -> [M', K], M' the next power of two; unchanged where no kernel is compiled for it."""
    rows = x.shape[0]
    if x.dtype not in COMPILED or not x.is_cpu or not rows & (rows - 1):
        return x
    return F.pad(x, (0, 0, 0, (1 << rows.bit_length()) - rows))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [M, K], `weight` [N, K] -> [M, N]"""
    padded = pad_rows(x)  # [M', K]
    y = F.linear(padded, weight, bias)  # [M', N]
    return y if padded is x else y[: len(x)]


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [M, K], `weight` [K, N] -> [M, N]"""
    padded = pad_rows(x)  # [M', K]
    y = padded @ weight  # [M', N]
    return y if padded is x else y[: len(x)]


def bound_shapes(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Every linear layer of `model` pads its rows; nothing is done where no kernels are compiled."""
    if dtype in COMPILED and device.type == "cpu":
        for module in model.modules():
            if type(module) is nn.Linear:
                _pad_rows_of(module)


def _pad_rows_of(module: Any) -> None:
    def forward(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [M, K]
        return linear(flat, module.weight, module.bias).view(*x.shape[:-1], -1)

    module.forward = forward
