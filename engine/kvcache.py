"""The KV cache: one allocation at open for every row and position that the plan allows, lent to one batch at a time.

A batch works in windows of it: some neighbouring rows that end at the same column. Columns mean nothing by themselves
(positions come from the mask), so rows may be moved along them. Sliding windows are kept in full; transformers' masks
still hide what has left the window. B rows of a window, N kv heads, C context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from store.errors import Busy

Shape = tuple[int, int]  # heads, width


class PooledLayer(CacheLayerMixin):  # type: ignore[misc]
    """One decoder layer's keys and values in a window: updates are copies into place, reads are views."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, first: int, rows: int) -> None:
        super().__init__()
        self._keys, self._values = keys, values  # [max B, N, C, width]
        self.is_initialized = True
        self.first, self.batch_size, self.length = first, rows, 0
        size = keys.itemsize
        self._strides = tuple(size * step for tensor in (keys, values) for step in tensor.stride()[:3])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Everything is there since open."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """`key_states`, `value_states` [B, N, new, width] -> everything so far, [B, N, length, width]."""
        start = self.length
        keys, values = self.extend(key_states.shape[2])
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        return keys, values

    def extend(self, columns: int) -> tuple[Tensor, Tensor]:
        """Everything so far and `columns` more, which the caller fills: two of [B, N, length, width]."""
        self.length += columns
        rows = slice(self.first, self.first + self.batch_size)
        return self._keys[rows, :, : self.length], self._values[rows, :, : self.length]

    def reserve(self, new: int = 1) -> tuple[int, int, tuple[int, ...]]:
        """`new` columns more, which the caller fills: where the first row's keys and values begin, and rows, heads,
        columns and the strides in bytes of rows, heads and columns, of keys and of values. `extend` without its views.
        """
        self.length += new
        shape = (self.batch_size, self._keys.shape[1], self.length)
        keys = self._keys.data_ptr() + self.first * self._strides[0]
        return keys, self._values.data_ptr() + self.first * self._strides[3], (*shape, *self._strides)

    def keep(self, order: Sequence[int]) -> None:
        """Only these rows go on, in this order. A row may only take the place of one that goes: nothing is swapped."""
        assert all(row == place or row >= len(order) for place, row in enumerate(order)), order
        for place, row in enumerate(order):
            self._move(self.first + row, 0, self.first + place, 0, self.length)
        self.batch_size = len(order)

    def shift(self, by: int) -> None:
        """Move every row `by` columns to the left, what is there is dropped; a negative `by` makes empty room."""
        for row in range(self.first, self.first + self.batch_size):
            self._move(row, max(by, 0), row, max(-by, 0), self.length - max(by, 0))
            self._clear(row, max(-by, 0))
        self.length -= by

    def absorb(self, other: PooledLayer) -> None:
        """The rows of `other`, a window further down and no longer than this one, become its last, ends aligned."""
        assert other.first >= self.first + self.batch_size, (other.first, self.first, self.batch_size)
        start = self.length - other.length
        for row in range(other.first, other.first + other.batch_size):
            place = self.first + self.batch_size
            self._move(row, 0, place, start, other.length)
            self._clear(place, start)
            self.batch_size += 1

    def fork(self, sources: Sequence[int]) -> None:
        """Copies of the rows `sources` become the last ones, in this order."""
        for row in sources:
            self._move(self.first + row, 0, self.first + self.batch_size, 0, self.length)
            self.batch_size += 1

    def push(self, row: int, by: int) -> None:
        """Move one row `by` columns to the right; its last ones are dropped."""
        self._move(self.first + row, 0, self.first + row, by, self.length - by)
        self._clear(self.first + row, by)

    def _move(self, row: int, start: int, place: int, target: int, columns: int) -> None:
        """A row at a time and a layer at a time, so that no copy of the cache is made."""
        if (row, start) == (place, target):
            return
        for tensor in (self._keys, self._values):
            piece = tensor[row, :, start : start + columns]
            tensor[place, :, target : target + columns].copy_(piece.clone() if row == place else piece)

    def _clear(self, row: int, columns: int) -> None:
        """Padding is masked, but an earlier request's infinities would outlive the mask: 0 x inf is no number."""
        for tensor in (self._keys, self._values):
            tensor[row, :, :columns].zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return int(self._keys.shape[2])


class KvPool:
    """The memory behind all layers."""

    def __init__(
        self, shapes: Sequence[tuple[Shape, Shape]], rows: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        def block(shape: Shape) -> Tensor:
            return torch.zeros(rows, shape[0], context, shape[1], dtype=dtype, device=device)

        self.rows, self.context = rows, context
        self._blocks = [(block(key), block(value)) for key, value in shapes]
        self._lent = False

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for pair in self._blocks for tensor in pair)

    @contextmanager
    def lend(self) -> Iterator[KvPool]:
        """The pool for one batch's windows. Raises Busy while another batch has it."""
        if self._lent:
            raise Busy("Another batch is being generated on this engine. Let it end first, or go through EngineWorker.")
        self._lent = True
        try:
            yield self
        finally:
            self._lent = False

    def window(self, first: int, rows: int) -> KvCache:
        """An empty cache for the rows from `first` on. Windows in use at one time must not overlap."""
        assert 0 <= first <= first + rows <= self.rows, (first, rows, self.rows)
        return KvCache([PooledLayer(keys, values, first, rows) for keys, values in self._blocks])


class KvCache(Cache):  # type: ignore[misc]
    """What the model sees of the pool: one window."""

    def __init__(self, layers: list[PooledLayer]) -> None:
        super().__init__(layers=layers)
        self._places = layers[0].batch_size

    @property
    def length(self) -> int:
        return int(self.layers[0].length)

    @property
    def rows(self) -> int:
        return int(self.layers[0].batch_size)

    def keep(self, order: Sequence[int]) -> None:
        for layer in self.layers:
            layer.keep(order)

    def shift(self, by: int) -> None:
        for layer in self.layers:
            layer.shift(by)

    def push(self, row: int, by: int) -> None:
        for layer in self.layers:
            layer.push(row, by)

    def absorb(self, other: KvCache) -> None:
        for layer, theirs in zip(self.layers, other.layers, strict=True):
            layer.absorb(theirs)

    def fork(self, sources: Sequence[int]) -> None:
        """Copies of the rows `sources` become the last ones: no more than the window was made for."""
        assert self.rows + len(sources) <= self._places, (self.rows, sources, self._places)
        for layer in self.layers:
            layer.fork(sources)

    def extend(self, layer: int, columns: int) -> tuple[Tensor, Tensor]:
        """As PooledLayer.extend, of one layer."""
        grown: tuple[Tensor, Tensor] = self.layers[layer].extend(columns)
        return grown

    def leave(self, layers: int, reached: int, rest: int) -> None:
        """Prompts went through the first `layers` alone, which end at column `reached` and the others at `rest`."""
        for number, layer in enumerate(self.layers):
            layer.length = reached if number < layers else rest

    def rewind(self, length: int) -> None:
        """Forget the columns from `length` on: a pass failed half-way."""
        for layer in self.layers:
            layer.length = length
