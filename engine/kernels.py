"""Which matrix products an engine uses: our own for few rows and for experts (engine.products), torch's for many.

In 16 bits on the CPU oneDNN compiles a kernel for every shape, about a megabyte that is not given back and a fifth of a
millisecond. So what goes to torch there is split into powers of two of rows, the last one padded.

M rows, K columns, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import products
from engine.attention import adopt_attention
from engine.attention_block import adopt_blocks
from engine.expert_shape import ExpertShape
from engine.norms import adopt_norms
from engine.products import PAIRS, WIDE, Products, multiplies
from engine.running_functions import ours
from engine.substitution import substitute
from store.errors import InvalidInput

# What one product more costs beside its rows: to lay out the weights, which takes as long as 17 to 20 rows of
# 1024 x 1024 and 1024 x 512, and to be called and put together, which takes as long as so many products of two numbers.
AGAIN = 20
CALL = 1 << 21
COMPILED = frozenset({torch.bfloat16, torch.float16})
FEW: Mapping[torch.dtype, int] = {torch.float32: 8, torch.bfloat16: 4}  # rows; above, torch is faster: measured
# The same where a matrix, or a layer's attention in one call, has few weights: what a call of torch's takes beside its
# arithmetic is more than its products gain.
FEW_BESIDE_FEW_WEIGHTS = 8
FEW_WEIGHTS = 1 << 17
# Weights of an expert that takes many rows; above, torch is little slower in float32, and nothing larger was measured.
SMALL: Mapping[torch.dtype, int] = {torch.float32: 1 << 20, torch.bfloat16: 1 << 23}
SMALL_BESIDE_TILES = 1 << 17  # the same for bfloat16 where the processor multiplies tiles of it, by torch alone
FEW_PAIRS = 32  # rows of bfloat16 by it, of a matrix of any size: up to there no slower than torch
FEW_BESIDE_TILES = 8  # where torch has tiles nobody measured, but eight rows take little longer than their weights


class Kernels:
    """`own` None: torch computes everything, and `name` says why."""

    def __init__(self, own: Products | None, name: str) -> None:
        self.own = own
        self.name = name
        self.running = 0  # modules with running states whose functions are ours

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
        if self.own is not None and self.own.multiplies_many(x, weight):
            return self.own.linear_many(x, weight, bias)
        return linear(x, weight, bias)

    def few(self, dtype: torch.dtype, weights: int) -> int:
        """How many rows at most our own products take, of a matrix or of a layer's largest part of so many weights."""
        if self.own is not None and self.own.instruction_set == PAIRS and dtype == torch.bfloat16:
            return FEW_BESIDE_TILES if products.bfloat16_in_tiles() else FEW_PAIRS
        few = FEW.get(dtype, 0) if self.own is not None else 0
        return max(few, FEW_BESIDE_FEW_WEIGHTS) if few and weights <= FEW_WEIGHTS else few

    def takes_many(self, shape: ExpertShape) -> bool:
        """Whether our own products run experts of this shape for many tokens, too."""
        if self.own is None or self.own.instruction_set not in WIDE or shape.across:
            return False
        if self.own.wide is not None and shape.dtype == torch.bfloat16:
            return True  # as fast as torch at any size, which would unpack each quantised expert first: measured
        tiles = shape.dtype == torch.bfloat16 and products.bfloat16_in_tiles()
        return shape.weights <= (SMALL_BESIDE_TILES if tiles else SMALL[shape.dtype])

    def adopt(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Linear layers, norms and attention of `model` take these products, where torch's own do no better. Needs the
        weights.
        """
        if self.own is not None:
            adopt_norms(model, self.own)
            adopt_attention(model, self.own)
            self.running = substitute(model, ours(self.own))
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
    return _in_few_shapes(lambda rows: F.linear(rows, weight, bias), x, weight.numel())


def product(x: Tensor, weight: Tensor) -> Tensor:
    """torch's: `x` [M, K], `weight` [K, N] -> [M, N]"""
    return _in_few_shapes(lambda rows: rows @ weight, x, weight.numel())


def _in_few_shapes(multiply: Callable[[Tensor], Tensor], x: Tensor, weights: int) -> Tensor:
    """`multiply` [M, K] -> [M, N] by so many weights, by products of as many rows as `row_counts` says where a kernel
    is compiled for each number."""
    if pad_rows(x) is x:
        return multiply(x)
    parts = torch.split(x, _real(row_counts(len(x), weights), len(x)))
    found = [multiply(pad_rows(part))[: len(part)] for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found)


def _real(counts: Sequence[int], rows: int) -> list[int]:
    """`counts` without the padding of the last."""
    return [*counts[:-1], rows - sum(counts[:-1])]


@lru_cache(maxsize=4096)
def row_counts(rows: int, weights: int) -> tuple[int, ...]:
    """Powers of two, the largest first, that hold `rows` rows in the least time; only the last is padded."""
    whole = 1 << (rows - 1).bit_length()
    if whole == rows:
        return (whole,)
    parts = (whole // 2, *row_counts(rows - whole // 2, weights))
    return (whole,) if whole <= sum(parts) + again(weights) * (len(parts) - 1) else parts


def again(weights: int) -> int:
    """Rows by a matrix of so many weights that take as long as one product more."""
    return AGAIN + CALL // weights
