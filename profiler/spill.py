"""Hidden states of a whole calibration text between two layers, in a file: memory holds one shard of them at a time.

One file for each finished layer, complete or absent under its name; the one before it goes when the next is there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from store.errors import BudgetError, CorruptStore
from store.sizes import show_bytes


class Spill:
    """`shapes` [B, S, H] of the shards, in order; `layer` counts decoder layers."""

    def __init__(self, folder: Path, name: str, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._shapes = tuple(shapes)
        sizes = [rows * length * hidden * dtype.itemsize for rows, length, hidden in shapes]
        self._offsets = np.cumsum([0, *sizes]).tolist()

    def has(self, layer: int) -> bool:
        """Whether the states after this layer are there, all of them."""
        path = self._path(layer)
        return path.exists() and path.stat().st_size == self._offsets[-1]

    def read(self, layer: int, shard: int) -> Tensor:
        start, end = self._offsets[shard : shard + 2]
        raw = np.fromfile(self._path(layer), np.uint8, count=end - start, offset=start)
        if len(raw) != end - start:
            raise CorruptStore(f"{self._path(layer)} was shortened by somebody else. Start the run again.")
        return torch.from_numpy(raw).view(self._dtype).view(self._shapes[shard])  # [B, S, H]

    @contextmanager
    def writing(self, layer: int) -> Iterator[BinaryIO]:
        """A file for the shards' states after this layer, for `append`; it gets its name when the block ends well.

        Raises BudgetError before anything is written if the disk has no room for it.
        """
        beside = self._path(layer).with_name(f"{self._path(layer).name}.partial")
        try:
            with beside.open("wb") as file:
                self._reserve(file)
                yield file
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path(layer))
        except OSError as error:
            beside.unlink(missing_ok=True)
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise self._no_room() from error
            raise
        except BaseException:
            beside.unlink(missing_ok=True)
            raise

    def append(self, file: BinaryIO, hidden: Tensor) -> None:
        file.write(hidden.contiguous().cpu().view(torch.uint8).numpy().tobytes())

    def forget(self, keep: int | None = None) -> None:
        """Removes the files of all layers but `keep`."""
        for path in self._folder.glob(f"{self._name}.layer*"):
            if keep is None or path != self._path(keep):
                path.unlink(missing_ok=True)

    def _reserve(self, file: BinaryIO) -> None:
        """Room for the whole file at once: a disk that is too full says so here, not in the middle of a layer."""
        if self._offsets[-1]:
            os.posix_fallocate(file.fileno(), 0, self._offsets[-1])

    def _no_room(self) -> BudgetError:
        return BudgetError(
            f"The hidden states of the calibration text take {show_bytes(self._offsets[-1])} in {self._folder}, twice "
            "while a layer runs, and the disk is full. Make room, set MOEPAGER_HOME to a larger disk, or give less "
            "calibration text; what the run has finished is kept."
        )

    def _path(self, layer: int) -> Path:
        return self._folder / f"{self._name}.layer{layer}"
