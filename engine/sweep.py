"""Prompts on their way through the decoder layers, one layer after the other: all chunks go through one before any goes
through the next, so that a layer's experts are paged in for all of them together.

Between two layers others may have their turn. B rows, S columns so far, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from torch import Tensor

from engine.kvcache import KvCache
from engine.passes import Passes
from engine.routing import Routing


class Sweep:
    """The columns from `start` to `end`, `columns` of them at a time. The cache has all before `start`."""

    def __init__(self, passes: Passes, start: int, end: int, columns: int) -> None:
        self.start, self.end = start, end
        self._passes = passes
        self._chunks = [(first, min(end, first + columns)) for first in range(start, end, columns)]
        self._carried: list[Tensor | None] = [None] * len(self._chunks)  # [B, columns, H] a chunk
        self._layer = self._chunk = 0  # what goes through next

    @property
    def at_last(self) -> bool:
        """Whether the next layer is the model's last."""
        return self._layer == len(self._passes.decoders) - 1

    def carry(self, ids: Tensor, full: Tensor, cache: KvCache, routing: Routing) -> None:
        """All chunks through the next layer, which is not the last. `ids` and `full` i64 [B, all columns].

        Where it is interrupted, the chunks that went through have done so for good: the next call goes on.
        """
        try:
            layer = partial(self._passes.layer, self._layer)
            while self._chunk < len(self._chunks):
                self._carried[self._chunk] = self._send(layer, ids, full, cache, routing)
                self._chunk += 1
        finally:
            cache.leave(self._layer + 1, self.end, self.start)
        self._layer, self._chunk = self._layer + 1, 0

    def end_chunks(
        self, ids: Tensor, full: Tensor, cache: KvCache, routing: Routing
    ) -> Iterator[tuple[int, int, Tensor]]:
        """All chunks through the last layer: of each its first column, the one after its last, and the logits of its
        last one, [B, V]. Interrupted, it goes on as `carry` does."""
        try:
            while self._chunk < len(self._chunks):
                logits = self._send(self._passes.last, ids, full, cache, routing)
                self._carried[self._chunk] = None
                self._chunk += 1
                yield *self._chunks[self._chunk - 1], logits
        finally:
            cache.rewind(self.end)

    def _send(self, run: Callable[..., Tensor], ids: Tensor, full: Tensor, cache: KvCache, routing: Routing) -> Tensor:
        """The next chunk through what `run` runs."""
        start, end = self._chunks[self._chunk]
        cache.rewind(start)
        return run(self._carried[self._chunk], ids[:, start:end], full[:, :end], cache, routing)

    def keep(self, order: Sequence[int]) -> None:
        """Only these rows go on, in this order."""
        self._carried = [None if states is None else states[list(order)] for states in self._carried]
