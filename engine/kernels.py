"""Which matrix products an engine uses: our own for few rows and for small experts (engine.products), torch's for many.

In 16 bits on the CPU oneDNN compiles a kernel for every shape, about a megabyte that is not given back and a fifth of a
millisecond. So what goes to torch there is padded to powers of two of rows, which costs about a tenth more time.

M rows, K columns, N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import products
from engine.attention import adopt_attention
from engine.attention_block import adopt_blocks
from engine.norms import adopt_norms
from engine.products import ExpertShape, Products, multiplies
from store.errors import InvalidInput

COMPILED = frozenset({torch.bfloat16, torch.float16})
FEW: Mapping[torch.dtype, int] = {torch.float32: 8, torch.bfloat16: 4}  # rows; above, torch is faster: measured
# The same where a matrix, or a layer's attention in one call, has few weights: what a call of torch's takes beside its
# arithmetic is more than its products gain.
FEW_BESIDE_FEW_WEIGHTS = 8
FEW_WEIGHTS = 1 << 17
# Weights of an expert that takes many rows; above, torch is faster in bfloat16 and little slower in float32.
SMALL: Mapping[torch.dtype, int] = {torch.float32: 1 << 20, torch.bfloat16: 1 << 17}
UNAIDED = 1 << 23  # the same for bfloat16 on a processor that must widen it: torch was 2 to 7 times slower, at any size
WIDE = frozenset({"AVX-512", "AVX2"})  # instruction sets for which that was measured


class Kernels:
    """`own` None: torch computes everything, and `name` says why."""

    def __init__(self, own: Products | None, name: str) -> None:
        self.own = own
        self.name = name

    @classmethod
    def choose(cls, wish: str, dtype: torch.dtype, device: torch.device) -> Kernels:
        """`wish` as in EngineConfig.kernel. Raises InvalidInput where "own" can't be had."""
        reason = _reason_against(wish, dtype, device)
        if not reason:
            own = Products(next(iter(products.instruction_sets())))
            return cls(own, f"own ({own.instruction_set})")
        if wish == "own":
            raise InvalidInput(
                f'kernel "own" was asked for, but our own products are {reason}. Install with a C compiler at hand '
                '(gcc) and serve float32 or bfloat16 on the CPU, or leave kernel at "auto".',
                param="kernel",
            )
        return cls(None, f"torch (our own are {reason})")

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [M, K], `weight` [N, K] -> [M, N]"""
        if self.own is not None and x.shape[0] <= self.few(x.dtype, weight.numel()) and multiplies(x, weight):
            return self.own.linear(x, weight, bias)
        return linear(x, weight, bias)

    @staticmethod
    def few(dtype: torch.dtype, weights: int) -> int:
        """How many rows at most our own products take, of a matrix or a layer's attention of so many weights."""
        few = FEW.get(dtype, 0)
        return max(few, FEW_BESIDE_FEW_WEIGHTS) if few and weights <= FEW_WEIGHTS else few

    def takes_many(self, shape: ExpertShape) -> bool:
        """Whether our own products run experts of this shape for many tokens, too."""
        if self.own is None or self.own.instruction_set not in WIDE:
            return False
        aided = shape.dtype == torch.float32 or products.bfloat16_in_hardware()
        return shape.weights <= (SMALL[shape.dtype] if aided else UNAIDED)

    def adopt(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Linear layers, norms and attention of `model` take these products, where torch's own do no better. Needs the
        weights.
        """
        if self.own is not None:
            adopt_norms(model, self.own)
            adopt_attention(model, self.own)
        if self.own is not None or (dtype in COMPILED and device.type == "cpu"):
            for module in model.modules():
                if type(module) is nn.Linear:
                    self._take_over(module)
        if self.own is not None:
            adopt_blocks(model, self.own, self.few)  # after the others, which are what it is tried against

    def _take_over(self, module: Any) -> None:
        def forward(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])  # [M, K]
            return self.linear(flat, module.weight, module.bias).view(*x.shape[:-1], -1)

        module.forward = forward


def kernel_name(wish: str, dtype: str, device: str) -> str:
    """What an engine would use. Raises InvalidInput as `Kernels.choose` does."""
    return Kernels.choose(wish, getattr(torch, dtype), torch.device(device)).name


def _reason_against(wish: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why our own products are not used; empty where they are."""
    if wish == "torch":
        return "switched off"
    if products.missing:
        return products.missing
    if device.type != "cpu":
        return f"for the CPU, not for {device.type}"
    return "" if dtype in FEW else f"not for {str(dtype).removeprefix('torch.')}"


def pad_rows(x: Tensor) -> Tensor:
    """`x` [M, K] -> [M', K], M' the next power of two; unchanged where no kernel is compiled for it."""
    rows = x.shape[0]
    if x.dtype not in COMPILED or not x.is_cpu or not rows & (rows - 1):
        return x
    return F.pad(x, (0, 0, 0, (1 << rows.bit_length()) - rows))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's: `x` [M, K], `weight` [N, K] -> [M, N]"""
    padded = pad_rows(x)  # [M', K]
    y = F.linear(padded, weight, bias)  # [M', N]
    return y if padded is x else y[: len(x)]


def product(x: Tensor, weight: Tensor) -> Tensor:
    """torch's: `x` [M, K], `weight` [K, N] -> [M, N]"""
    padded = pad_rows(x)  # [M', K]
    y = padded @ weight  # [M', N]
    return y if padded is x else y[: len(x)]
