"""One layer's attention as products.c takes it: where its weights are, and in which manner heads turn. Decides nothing.

A heads, D the width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.addresses import DTYPES, address_of

HALVES, NEIGHBOURS, NEIGHBOURS_EACH, HALVES_ONCE = range(4)


class Turn(NamedTuple):
    """How heads of queries and keys turn: `rotary` of their numbers, each with the one half of them later or with its
    neighbour. Cosines and sines are one for each number, or the first half of so many, or half as many (`ONCE`). Norms
    of queries and keys come before or, `late`, after it."""

    rotary: int
    positions: torch.dtype
    turning: int = HALVES
    late: bool = False


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One layer's attention as products.c takes it: `fields` are those of its `struct block`, addresses of
    weights among them, which `kept` holds.
    """

    fields: tuple[int | float, ...]
    dtype: torch.dtype
    positions: torch.dtype  # of cosines and sines
    hidden: int
    heads: int
    kv_heads: int
    head: int
    kept: tuple[Tensor, ...]

    @property
    def weights(self) -> int:
        """Numbers that a token is multiplied with, biases and norms among them."""
        return sum(tensor.numel() for tensor in self.kept)

    @classmethod
    def of(
        cls, linears: Sequence[Any], norms: Sequence[Any], head: int, scale: float, turn: Turn,
        sinks: Tensor | None = None,
    ) -> BlockShape | None:  # fmt: skip
        """Of q, k, v and output projections and of the norms of q and k, or None for each; `sinks` f32 [A] or None.
        None where it can't be."""
        rotary = turn.rotary
        weights = [linear.weight for linear in linears]
        rows = [len(weight) for weight in weights]
        dtype, hidden = weights[0].dtype, weights[0].shape[1]
        fits = rows[1] == rows[2] and rows[0] % rows[1] == rows[1] % head == 0 and rotary <= head and rotary % 2 == 0
        tensors = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
        tensors += [None if norm is None else norm.weight for norm in norms]
        shaped = [tuple(weight.shape[1:]) for weight in weights] == [(hidden,)] * 3 + [(rows[0],)]
        if not fits or not shaped or dtype not in DTYPES or not all(_plain(tensor, dtype) for tensor in tensors):
            return None
        kinds = [_norm_fields(norm, head, count) for norm, count in zip(norms, rows, strict=False)]
        if None in kinds:
            return None
        places = [
            value
            for at, count in zip((0, 2, 4, 6), rows, strict=True)
            for value in (*map(address_of, tensors[at : at + 2]), count)
        ]
        fields = (
            DTYPES[dtype],
            *places,
            hidden,
            *(value for kind in kinds if kind for value in kind),
            head,
            rotary,
            scale,
            turn.turning,
            int(turn.late),
            DTYPES[turn.positions],
            address_of(sinks),
        )
        held = tuple(tensor for tensor in (*tensors, sinks) if tensor is not None)
        return cls(fields, dtype, turn.positions, hidden, rows[0] // head, rows[1] // head, head, held)


def _plain(tensor: Tensor | None, dtype: torch.dtype) -> bool:
    return tensor is None or (tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous())


def _norm_fields(norm: Any, head: int, count: int) -> tuple[int, int, float] | None:
    """Of a norm over each head or over all `count` numbers; None where it is neither."""
    if norm is None:
        return 0, 0, 0.0
    eps = norm_eps(norm)
    width = norm.weight.numel()
    return (address_of(norm.weight), width, eps) if eps is not None and width in (head, count) else None


def norm_eps(norm: Any) -> float | None:
    """What a norm of transformers adds to the mean of squares."""
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else None
