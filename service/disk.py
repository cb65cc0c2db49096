"""How fast the disk under a model gives its bytes: a short direct read of the checkpoint itself."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.reader import Reader
from engine.transfer import Extent
from store.errors import CheckpointError

BLOCK = 4 * 2**20
SECONDS = 0.5  # long enough to be right within tens of percent, short enough for a command that only plans
MOST = 256 * 2**20


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds


def measure_disk(files: Sequence[Path], seconds: float = SECONDS) -> DiskSpeed:
    """Read blocks from the files, the largest first, past the page cache where the file system allows it."""
    blocks = _blocks(files)
    block = np.zeros(BLOCK, np.uint8)
    read, started = 0, time.perf_counter()
    with Reader(BLOCK + 8192) as reader:
        for file, offset, length in itertools.cycle(blocks):  # a small model is read again: direct reads are not cached
            reader.read([Extent(file, offset, length, block[:length])])
            read += length
            if time.perf_counter() - started > seconds or read >= MOST:
                break
    return DiskSpeed(read, time.perf_counter() - started)


def _blocks(files: Sequence[Path]) -> list[tuple[Path, int, int]]:
    """File, offset and length of every block, those of the largest file first."""
    sizes = sorted(((file.stat().st_size, file) for file in files), reverse=True)
    found = [(file, at, min(BLOCK, size - at)) for size, file in sizes for at in range(0, size, BLOCK)]
    if not found:
        raise CheckpointError("No bytes to measure the disk with: the model folder has no safetensors files.")
    return found
