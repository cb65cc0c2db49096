"""The cache: one allocation at open for every row and position that the plan allows, lent to one batch at a time.

A batch works in windows of it: some neighbouring rows that end at the same column. Columns mean nothing by themselves
(positions come from the mask), so rows may be moved along them. Sliding windows are kept in full; transformers' masks
still hide what has left the window. Running states have no columns: see engine.running_state. B rows of a window, N kv
heads, C context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from engine.cache_shape import CacheShape, Kind, StateShape
from engine.layerwise import Reached
from engine.running_state import RunningLayer, States
from engine.window import Window
from store.errors import Busy


class PooledLayer(Window, CacheLayerMixin):  # type: ignore[misc]
    """One decoder layer's columns in a window: updates are copies into place, reads are views."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, first: int, rows: int, index: Tensor | None = None) -> None:
        """`keys`, `values` [max B, N, C, width]; where there is an indexer, its keys `index` [max B, 1, C, width]."""
        CacheLayerMixin.__init__(self)
        self._keys, self._values, self._index = keys, values, index
        self._columns = [each for each in (keys, values, index) if each is not None]
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

    @property
    def length(self) -> int:
        """Columns so far."""
        return self._length

    @length.setter
    def length(self, columns: int) -> None:
        self._length = self._indexed = columns

    def update_indexer(self, keys: Tensor) -> Tensor:
        """`keys` [B, new, width] of an indexer, which may come before `update` or after it -> all so far."""
        assert self._index is not None, "no indexer was seen when the model was tried"
        start, self._indexed = self._indexed, self._indexed + keys.shape[1]
        seen = self._index[self.first : self.first + self.batch_size, 0, : self._indexed]
        seen[:, start:] = keys
        return seen

    def extend(self, columns: int) -> tuple[Tensor, Tensor]:
        """Everything so far and `columns` more, which the caller fills: two of [B, N, length, width]."""
        self._length += columns
        rows = slice(self.first, self.first + self.batch_size)
        return self._keys[rows, :, : self.length], self._values[rows, :, : self.length]

    def reserve(self, new: int = 1) -> tuple[int, int, tuple[int, ...]]:
        """`new` columns more, which the caller fills: where the first row's keys and values begin, and rows, heads,
        columns and the strides in bytes of rows, heads and columns, of keys and of values. `extend` without its views.
        """
        self._length += new
        shape = (self.batch_size, self._keys.shape[1], self.length)
        keys = self._keys.data_ptr() + self.first * self._strides[0]
        return keys, self._values.data_ptr() + self.first * self._strides[3], (*shape, *self._strides)

    def shift(self, by: int) -> None:
        """Move every row `by` columns to the left, what is there is dropped; a negative `by` makes empty room."""
        for row in range(self.first, self.first + self.batch_size):
            self._move(row, max(by, 0), row, max(-by, 0), self.length - max(by, 0))
            self._clear(row, max(-by, 0))
        self.length -= by

    def push(self, row: int, by: int) -> None:
        """Move one row `by` columns to the right; its last ones are dropped."""
        self._move(self.first + row, 0, self.first + row, by, self.length - by)
        self._clear(self.first + row, by)

    def _bring(self, source: Window, row: int, place: int) -> None:
        """Ends aligned: what `source` is shorter by is empty."""
        assert isinstance(source, PooledLayer), type(source)
        start = self.length - source.length
        self._move(source.first + row, 0, self.first + place, start, source.length)
        self._clear(self.first + place, start)

    def _move(self, row: int, start: int, place: int, target: int, columns: int) -> None:
        """A row at a time and a layer at a time, so that no copy of the cache is made."""
        if (row, start) == (place, target):
            return
        for tensor in self._columns:
            piece = tensor[row, :, start : start + columns]
            tensor[place, :, target : target + columns].copy_(piece.clone() if row == place else piece)

    def _clear(self, row: int, columns: int) -> None:
        """Padding is masked, but an earlier request's infinities would outlive the mask: 0 x inf is no number."""
        for tensor in self._columns:
            tensor[row, :, :columns].zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return int(self._keys.shape[2])


class HybridLayer(RunningLayer, PooledLayer):
    """Columns and running states in one decoder layer."""

    def __init__(
        self, keys: Tensor, values: Tensor, first: int, rows: int, index: Tensor | None, states: States
    ) -> None:  # fmt: skip
        PooledLayer.__init__(self, keys, values, first, rows, index)
        RunningLayer.__init__(self, states, first, rows)

    def _bring(self, source: Window, row: int, place: int) -> None:
        RunningLayer._bring(self, source, row, place)
        PooledLayer._bring(self, source, row, place)


@dataclass(frozen=True, slots=True)
class _Block:
    """One decoder layer's memory for all rows."""

    keys: Tensor | None  # [B, N, C, width], as are the values
    values: Tensor | None
    index: Tensor | None  # [B, 1, C, width]
    states: States

    @classmethod
    def of(
        cls, shape: CacheShape, rows: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> _Block:  # fmt: skip
        def columns(heads: int, width: int) -> Tensor:
            return torch.zeros(rows, heads, context, width, dtype=dtype, device=device)

        keys, values = (None, None) if shape.kv is None else (columns(*each) for each in shape.kv)
        index = columns(1, shape.index) if shape.index else None

        def twice(state: StateShape) -> tuple[Tensor, Tensor]:
            held, spare = torch.zeros(2, rows, *state.shape, dtype=state.dtype, device=device)
            return held, spare

        return cls(keys, values, index, {(each.kind, each.at): twice(each) for each in shape.states})

    @property
    def nbytes(self) -> int:
        columns = [each for each in (self.keys, self.values, self.index) if each is not None]
        return sum(tensor.nbytes for tensor in (*columns, *chain.from_iterable(self.states.values())))

    def window(self, first: int, rows: int) -> PooledLayer | RunningLayer | DummyLayer:
        if self.keys is None or self.values is None:
            return RunningLayer(self.states, first, rows) if self.states else DummyLayer()
        if self.states:
            return HybridLayer(self.keys, self.values, first, rows, self.index, self.states)
        return PooledLayer(self.keys, self.values, first, rows, self.index)


class KvPool:
    """The memory behind all layers."""

    def __init__(
        self, shapes: Sequence[CacheShape], rows: int, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """At least one of the layers has columns."""
        self.rows, self.context, self.device = rows, context, device
        self._blocks = [_Block.of(shape, rows, context, dtype, device) for shape in shapes]
        self._lent = False

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

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
        return KvCache([block.window(first, rows) for block in self._blocks])


class KvCache(Cache):  # type: ignore[misc]
    """What the model sees of the pool: one window."""

    def __init__(self, layers: Sequence[PooledLayer | RunningLayer | DummyLayer]) -> None:
        super().__init__(layers=list(layers))
        self._grown = [layer for layer in layers if isinstance(layer, PooledLayer)]
        self._running = [layer for layer in layers if isinstance(layer, RunningLayer)]
        self._held = [layer for layer in layers if isinstance(layer, PooledLayer | RunningLayer)]
        self._places = self._grown[0].batch_size

    @property
    def length(self) -> int:
        return self._grown[0].length

    @property
    def rows(self) -> int:
        return self._grown[0].batch_size

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """None before the first token. Whatever is written into it counts from the end of the pass on."""
        return self._state(layer_idx, "conv", state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """As `get_conv_state`."""
        return self._state(layer_idx, "recurrent", state_idx)

    def _state(self, layer: int, kind: Kind, at: int) -> Tensor | None:
        running: RunningLayer = self.layers[layer]
        return running.read(kind, at) if running.has_previous_state[at] else None

    def running_states(self) -> list[Tensor]:
        """Copies of those that the rows have in the first layer with any, [B, ...] each."""
        return self._running[0].held() if self._running else []

    def keep(self, order: Sequence[int]) -> None:
        for layer in self._held:
            layer.keep(order)

    def shift(self, by: int) -> None:
        for layer in self._grown:
            layer.shift(by)

    def push(self, row: int, by: int) -> None:
        for layer in self._grown:
            layer.push(row, by)

    def absorb(self, other: KvCache) -> None:
        for layer, theirs in zip(self._held, other._held, strict=True):
            layer.absorb(theirs)

    def fork(self, sources: Sequence[int]) -> None:
        """Copies of the rows `sources` become the last ones: no more than the window was made for."""
        assert self.rows + len(sources) <= self._places, (self.rows, sources, self._places)
        for layer in self._held:
            layer.fork(sources)

    def extend(self, layer: int, columns: int) -> tuple[Tensor, Tensor]:
        """As PooledLayer.extend, of one layer."""
        grown: tuple[Tensor, Tensor] = self.layers[layer].extend(columns)
        return grown

    def leave(self, layers: int, reached: int, rest: int) -> None:
        """Prompts went through the first `layers` alone, which end at column `reached` and the others at `rest`."""
        for number, layer in enumerate(self.layers):
            if isinstance(layer, PooledLayer):
                layer.length = reached if number < layers else rest

    def rewind(self, length: int) -> None:
        """Forget the columns from `length` on: a pass failed half-way."""
        for layer in self._grown:
            layer.length = length

    @contextmanager
    def passing(self, mask: Tensor) -> Iterator[None]:
        """One pass over the columns of `mask` i64 [B, new]: what it makes of running states counts if it gets through,
        for rows whose last column is no padding. Ended by Reached, it did.
        """
        if not self._running:
            yield
            return
        try:
            yield
        except Reached:
            self._settle(mask)
            raise
        except BaseException:
            for layer in self._running:
                layer.forget()
            raise
        self._settle(mask)

    def _settle(self, mask: Tensor) -> None:
        last = mask[:, -1].bool()  # [B]
        moved = None if bool(last.all()) else last
        for layer in self._running:
            layer.settle(moved)
