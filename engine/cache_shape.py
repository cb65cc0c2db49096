"""What a decoder layer remembers of a row, as one token through transformers' own cache shows it.

Columns grow by one for each token: keys and values and, where an indexer chooses what attention looks at, its keys.
Running states keep their size: the last inputs of a convolution, the state of linear attention or a state space.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch

Shape = tuple[int, int]  # heads and width
Kind = Literal["conv", "recurrent"]


@dataclass(frozen=True, slots=True)
class StateShape:
    """One running state. A layer may have several of a kind: `at` is which."""

    kind: Kind
    at: int
    shape: tuple[int, ...]  # of one row
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of one row."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class CacheShape:
    """One decoder layer: heads and width of keys and values, if it has any, the width of an indexer's keys or 0, and
    its running states."""

    kv: tuple[Shape, Shape] | None = None
    index: int = 0
    states: tuple[StateShape, ...] = ()

    @classmethod
    def of(cls, layer: Any) -> CacheShape:
        """Of a layer of transformers' DynamicCache, through which one row of one token went."""
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        index = getattr(layer, "indexer_keys", None)
        return cls(
            kv=None if keys is None or values is None else (_shape(keys), _shape(values)),
            index=0 if index is None else index.shape[2],
            states=(*_states("conv", layer), *_states("recurrent", layer)),
        )

    @property
    def numbers(self) -> int:
        """That it keeps of each token."""
        return self.index + sum(heads * width for heads, width in self.kv or ())

    @property
    def remembers(self) -> bool:
        """Whether it keeps anything at all."""
        return self.kv is not None or bool(self.states)


def row_bytes(shapes: Iterable[CacheShape]) -> int:
    """Of all running states of a row: what it has, and what a pass makes of it."""
    return 2 * sum(state.nbytes for shape in shapes for state in shape.states)


def _shape(columns: torch.Tensor) -> Shape:
    """Of [B, N, C, width]."""
    return columns.shape[1], columns.shape[3]


def _states(kind: Kind, layer: Any) -> list[StateShape]:
    held: dict[int, torch.Tensor | None] = getattr(layer, f"{kind}_states", {})
    return [StateShape(kind, at, tuple(each.shape[1:]), each.dtype) for at, each in held.items() if each is not None]
