"""Reads byte ranges of files into memory that the caller owns: sorted, coalesced, direct where the disk allows it.

Knows nothing of experts or tensors. Direct reads (O_DIRECT) go through small aligned buffers that are allocated once;
where the file system refuses them, buffered reads do, and the page cache is told to let go of what was read.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from store.errors import CheckpointError

Bytes = npt.NDArray[np.uint8]

ALIGN = 4096  # offset, length and address of a direct read
WORTH_A_THREAD = 2**20  # bytes; below, handing work over costs more than it saves
GAP = 64 * 1024  # reading over a hole this small is cheaper than a second request


class Extent(NamedTuple):
    """A range of a file and where its bytes go: `into` is u8 [nbytes], writable and contiguous."""

    file: Path
    offset: int
    nbytes: int
    into: Bytes


@dataclass(frozen=True, slots=True)
class ReadReport:
    """`needed` bytes were asked for; `read` came from the file, with alignment and small holes between ranges."""

    needed: int
    read: int
    seconds: float


class _Run(NamedTuple):
    """Neighbouring extents of one file that one request covers, from byte `start` up to `end`."""

    file: Path
    start: int
    end: int
    extents: tuple[Extent, ...]


class Reader:
    """Keeps one descriptor per file open, so a file that is replaced later is never mixed in. One caller at a time."""

    def __init__(self, staging_bytes: int, threads: int = 1, direct: bool = True) -> None:
        """`staging_bytes` is the size of one thread's buffer; it bounds the length of a single request."""
        size = max(4 * ALIGN, staging_bytes // ALIGN * ALIGN)
        self._longest = size - 2 * ALIGN  # room for the alignment at both ends
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()
        self._staging = [_aligned(size) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, "moepager-read") if threads > 1 else None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, extents: Sequence[Extent]) -> ReadReport:
        """Fill every extent. Raises CheckpointError naming file, offset, wanted and got: then trust nothing of them."""
        started = time.perf_counter()
        runs = list(coalesce(extents, self._longest))
        if self._pool is None or len(runs) < 2 or sum(run.end - run.start for run in runs) < WORTH_A_THREAD:
            read = self._read_runs(runs, self._staging[0])
        else:
            shares = [runs[i :: len(self._staging)] for i in range(len(self._staging))]
            pairs = zip(shares, self._staging, strict=True)
            futures = [self._pool.submit(self._read_runs, share, staging) for share, staging in pairs]
            wait(futures)  # all of them: after a failure no thread may still be writing into a slot
            read = sum(future.result() for future in futures)
        return ReadReport(sum(extent.nbytes for extent in extents), read, time.perf_counter() - started)

    def _read_runs(self, runs: Sequence[_Run], staging: Bytes) -> int:
        return sum(self._file(run.file).fill(run, staging) for run in runs)

    def _file(self, path: Path) -> _File:
        with self._lock:
            if path not in self._files:
                self._files[path] = _File(path, self._direct)
            return self._files[path]


class _File:
    """One open file and the way it is read: direct until the file system says no, then buffered."""

    def __init__(self, path: Path, direct: bool) -> None:
        self._path = path
        self._buffered = _open(path, 0)
        self._direct: int | None = None
        self._refused = False
        if direct:
            try:
                self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            except OSError as error:
                if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                    raise _unreadable(path, error) from error

    def close(self) -> None:
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)

    def fill(self, run: _Run, staging: Bytes) -> int:
        if self._direct is not None and not self._refused:
            try:
                return self._fill_direct(self._direct, run, staging)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise _failed(run, error) from error
                self._refused = True  # the descriptor stays open: another thread may be reading from it
        return self._fill_buffered(run)

    def _fill_direct(self, descriptor: int, run: _Run, staging: Bytes) -> int:
        start = run.start // ALIGN * ALIGN
        length = -(-(run.end - start) // ALIGN) * ALIGN
        got = 0
        while got < run.end - start:
            n = os.preadv(descriptor, [staging[got:length]], start + got)  # type: ignore[list-item]
            if n == 0:
                raise _short(run, start + got)
            got += n
            if got < run.end - start and got % ALIGN:  # the end of a file that shrank: no aligned place to go on from
                raise _short(run, start + got)
        for extent in run.extents:
            at = extent.offset - start
            np.copyto(extent.into, staging[at : at + extent.nbytes])
        return got

    def _fill_buffered(self, run: _Run) -> int:
        for extent in run.extents:
            got = 0
            while got < extent.nbytes:
                try:
                    n = os.preadv(self._buffered, [extent.into[got:]], extent.offset + got)  # type: ignore[list-item]
                except OSError as error:
                    raise _failed(run, error) from error
                if n == 0:
                    raise _short(run, extent.offset + got)
                got += n
        os.posix_fadvise(self._buffered, run.start, run.end - run.start, os.POSIX_FADV_DONTNEED)
        return sum(extent.nbytes for extent in run.extents)


def coalesce(extents: Iterable[Extent], longest: int) -> Iterator[_Run]:
    """Sort by place and merge neighbours into runs of at most `longest` bytes; a longer extent becomes several runs."""
    held: list[Extent] = []
    for extent in sorted(_split(extents, longest), key=lambda e: (e.file, e.offset)):
        if held:
            first, last = held[0], held[-1]
            near = extent.file == first.file and extent.offset - (last.offset + last.nbytes) <= GAP
            if not near or extent.offset + extent.nbytes - first.offset > longest:
                yield _run(held)
                held = []
        held.append(extent)
    if held:
        yield _run(held)


def _split(extents: Iterable[Extent], longest: int) -> Iterator[Extent]:
    for extent in extents:
        assert extent.into.nbytes == extent.nbytes, extent
        for at in range(0, extent.nbytes, longest):
            piece = extent.into[at : at + longest]
            yield Extent(extent.file, extent.offset + at, piece.nbytes, piece)


def _run(extents: Sequence[Extent]) -> _Run:
    end = max(extent.offset + extent.nbytes for extent in extents)
    return _Run(extents[0].file, extents[0].offset, end, tuple(extents))


def _aligned(size: int) -> Bytes:
    """Page-aligned and already faulted in: the first touch of fresh memory is slower than the disk."""
    buffer = np.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    buffer.fill(0)
    return buffer


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"Can't open {path}: {error.strerror}. Put the file back, or open the model again.")


def _failed(run: _Run, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"Reading {run.end - run.start} bytes of {run.file} at offset {run.start} failed: {error.strerror}. "
        "Check the disk, then the file."
    )


def _short(run: _Run, end: int) -> CheckpointError:
    return CheckpointError(
        f"{run.file} is shorter than when it was opened: wanted {run.end - run.start} bytes at offset {run.start}, "
        f"got {max(0, end - run.start)}. Put the whole file back and open the model again."
    )
