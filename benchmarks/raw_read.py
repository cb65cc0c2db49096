"""The physical limit: what the disk gives when the same bytes are read directly into a reused buffer, and no more.

Where a file system refuses direct reads, they are buffered; `is_direct` tells.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """How a raw read is cut: bytes a call, and calls in flight."""

    block: int
    depth: int


@dataclass(frozen=True, slots=True)
class Range:
    file: Path
    offset: int
    length: int


TRIED = 256 << 20  # bytes of one try
STAGES = ((5, 4), (9, 1))  # rounds, and how many of the shapes are left after them
SHAPES = tuple(Shape(block << 20, depth) for block in (1, 4, 8) for depth in (1, 2, 4, 6))


def read_seconds(ranges: Sequence[Range], shape: Shape, buffers: Sequence[mmap.mmap]) -> float:
    """Seconds to read all ranges directly, cut into aligned blocks, by `shape.depth` threads. Data is dropped."""
    paths = {range_.file for range_ in ranges}
    flags = os.O_RDONLY | (os.O_DIRECT if is_direct(paths) else 0)
    files = {file: os.open(file, flags) for file in paths}
    blocks = [block for range_ in ranges for block in _blocks(range_, shape.block)]
    started = time.perf_counter()
    try:
        with ThreadPoolExecutor(shape.depth) as pool:
            list(
                pool.map(
                    lambda lane: _read(blocks[lane :: shape.depth], files, buffers[lane], shape.block),
                    range(shape.depth),
                )
            )
        return time.perf_counter() - started
    finally:
        for fd in files.values():
            os.close(fd)


def is_direct(files: Iterable[Path]) -> bool:
    """Whether all of `files` can be opened for direct reads."""
    for file in files:
        try:
            os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                raise
            return False
    return True


def lanes(shape: Shape) -> list[mmap.mmap]:
    """Page-aligned buffers, touched once so that no page fault is timed."""
    buffers = [mmap.mmap(-1, shape.block) for _ in range(shape.depth)]
    for buffer in buffers:
        buffer.write(b"\1" * shape.block)
    return buffers


def best_shape(ranges: Sequence[Range], seed: int = 0) -> Shape:
    """The shape that is the fastest beside the others of its round, in the median: first of all, then of the best four.

    Tried on a part of `ranges`: short reads, so that shapes of a round meet the same disk, each round in another order.
    By its best of two single tries a drifting disk had a slow shape chosen, and the limit was then too low.
    """
    part, rng = some(ranges, TRIED, seed), random.Random(seed)
    left = list(SHAPES)
    for rounds, best in STAGES:
        beside = _beside_each_other(part, left, rounds, rng)
        left = sorted(left, key=lambda shape: median(beside[shape]))[:best]
    return left[0]


def _beside_each_other(
    part: Sequence[Range], shapes: Sequence[Shape], rounds: int, rng: random.Random
) -> dict[Shape, list[float]]:
    """Of each shape, its seconds over the usual ones of each round."""
    buffers = lanes(Shape(max(shape.block for shape in shapes), max(shape.depth for shape in shapes)))
    beside: dict[Shape, list[float]] = {shape: [] for shape in shapes}
    for _ in range(rounds):
        seconds = {shape: read_seconds(part, shape, buffers) for shape in rng.sample(shapes, len(shapes))}
        for shape, taken in seconds.items():
            beside[shape].append(taken / median(seconds.values()))
    return beside


def some(ranges: Sequence[Range], size: int, seed: int) -> list[Range]:
    """Random ones of `ranges`, in order, until they have `size` bytes; all if they have fewer."""
    chosen: list[Range] = []
    for range_ in random.Random(seed).sample(ranges, len(ranges)):
        if sum(one.length for one in chosen) >= size:
            break
        chosen.append(range_)
    return merged(chosen)


def merged(ranges: Sequence[Range]) -> list[Range]:
    """Sorted, with neighbours joined: nobody reads faster than that."""
    joined: list[Range] = []
    for range_ in sorted(ranges, key=lambda r: (str(r.file), r.offset)):
        last = joined[-1] if joined else None
        if last and last.file == range_.file and last.offset + last.length == range_.offset:
            joined[-1] = Range(last.file, last.offset, last.length + range_.length)
        else:
            joined.append(range_)
    return joined


def _blocks(range_: Range, block: int) -> list[tuple[Path, int, int]]:
    start = range_.offset // ALIGNMENT * ALIGNMENT
    end = range_.offset + range_.length
    return [
        (range_.file, offset, min(block, -(-(end - offset) // ALIGNMENT) * ALIGNMENT))
        for offset in range(start, end, block)
    ]


def _read(blocks: Sequence[tuple[Path, int, int]], files: dict[Path, int], buffer: mmap.mmap, size: int) -> None:
    view = memoryview(buffer)
    for file, offset, length in blocks:
        os.preadv(files[file], [view[: min(length, size)]], offset)
