"""Memory that calls of engine.products use while they run: allocated once and kept, for fresh memory is slow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Scratch:
    """As much as the largest call so far needed. For one thread at a time."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)
        self._outputs = torch.empty(0)

    @property
    def nbytes(self) -> int:
        return self._room.nbytes + self._outputs.nbytes

    def run(self, call: Callable[[int, int], int]) -> None:
        """`call` is handed an address and the bytes there, and says how many it needs where these are too few: then it
        is called again with as many."""
        needed = call(self._room.data_ptr(), self._room.nbytes)
        if needed:
            self._room = torch.empty(0, dtype=torch.uint8)  # what is too small goes first
            self._room = torch.empty(needed, dtype=torch.uint8)
            needed = call(self._room.data_ptr(), self._room.nbytes)
        assert not needed, needed

    def outputs(self, rows: int, columns: int) -> Tensor:
        """f32 [`rows`, `columns`] of any numbers, good until this is called again."""
        if self._outputs.numel() < rows * columns:
            self._outputs = torch.empty(0)
            self._outputs = torch.empty(rows * columns)
        return self._outputs[: rows * columns].view(rows, columns)
