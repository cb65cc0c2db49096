"""The KV cache: one allocation at open for every row and position that the plan allows, lent to one batch at a time.

Sliding windows are kept in full; transformers' masks still hide what has left the window. B rows, N kv heads, C
context.
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
    """One decoder layer's keys and values: updates are copies into place, reads are views."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._keys, self._values = keys, values  # [max B, N, C, width]
        self.is_initialized = True
        self.start(0)

    def start(self, rows: int) -> None:
        self.batch_size = rows
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Everything is there since open."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """`key_states`, `value_states` [B, N, new, width] -> everything so far, [B, N, length, width]."""
        end = self.length + key_states.shape[2]
        keys, values = self._keys[: self.batch_size, :, :end], self._values[: self.batch_size, :, :end]
        keys[:, :, self.length :] = key_states
        values[:, :, self.length :] = value_states
        self.length = end
        return keys, values

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on; they move up, in their order, one at a time so that no copy of the cache is made."""
        for place, row in enumerate(rows):
            if place != row:
                for tensor in (self._keys, self._values):
                    tensor[place, :, : self.length].copy_(tensor[row, :, : self.length])
        self.batch_size = len(rows)

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
        self._layers = [PooledLayer(block(key), block(value)) for key, value in shapes]
        self._lent = False

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self._layers for tensor in (layer._keys, layer._values))

    @contextmanager
    def lend(self, rows: int) -> Iterator[KvCache]:
        """An empty cache for `rows` rows. Raises Busy while another batch has it."""
        if self._lent:
            raise Busy("Another batch is being generated on this engine. Let it end first, or go through EngineWorker.")
        assert rows <= self.rows, (rows, self.rows)
        self._lent = True
        try:
            for layer in self._layers:
                layer.start(rows)
            yield KvCache(self._layers)
        finally:
            self._lent = False


class KvCache(Cache):  # type: ignore[misc]
    """What the model sees of the pool."""

    def __init__(self, layers: list[PooledLayer]) -> None:
        super().__init__(layers=layers)

    @property
    def length(self) -> int:
        return int(self.layers[0].length)

    def keep(self, rows: Sequence[int]) -> None:
        for layer in self.layers:
            layer.keep(rows)
