"""How fast the disk under a model gives its bytes: a short direct read of the checkpoint itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.reader import Extent, Reader
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
    block = np.empty(BLOCK, np.uint8)
    read, started = 0, time.perf_counter()
    with Reader(BLOCK + 8192) as reader:
        for file in sorted(files, key=lambda file: -file.stat().st_size):
            size = file.stat().st_size
            for offset in range(0, size, BLOCK):
                length = min(BLOCK, size - offset)
                reader.read([Extent(file, offset, length, block[:length])])
                read += length
                if time.perf_counter() - started > seconds or read >= MOST:
                    return DiskSpeed(read, time.perf_counter() - started)
    if not read:
        raise CheckpointError("No bytes to measure the disk with: the model folder has no safetensors files.")
    return DiskSpeed(read, time.perf_counter() - started)
