"""Reads byte ranges of files into memory that the caller owns: sorted, coalesced, direct where the disk allows it.

Knows nothing of experts or tensors. A few threads share one queue of requests, each with an aligned buffer that is
allocated once: while one copies out of its buffer, another reads. Direct reads (O_DIRECT) where the file system allows
them; where it refuses, buffered ones, and the page cache is told to let go of what was read.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from engine.transfer import Bytes, Extent, Fetched, Pulse, Run, Transfer
from store.errors import CheckpointError, DiskError
from store.identity import Identity

ALIGN = 4096  # offset, length and address of a direct read
GAP = 64 * 1024  # reading over a hole this small is cheaper than a second request
PATIENCE = 30.0  # seconds that one request may take
WINDOW = 4 * 2**30  # bytes; see Meter
JOIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ReadReport:
    """`needed` bytes were asked for; `read` came from the file, with alignment and small holes between ranges."""

    needed: int
    read: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Access:
    """How files are read: "direct", "buffered" (through the page cache), or "mixed"; `why` says what refused direct
    reads, None where nothing did."""

    name: str
    why: str | None = None


class Meter:
    """How fast bytes are read or converted: what was asked for over the seconds in which any of it was under way.

    What was long ago counts less: once `WINDOW` bytes were read, all that came before counts half.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes, self._seconds = 0.0, 0.0
        self._working, self._since = 0, 0.0

    @property
    def bytes_per_second(self) -> float | None:
        """None until something was read. Callable from any thread."""
        with self._lock:
            return self._bytes / self._seconds if self._bytes and self._seconds else None

    def begin(self) -> None:
        """Some bytes are worked on from now."""
        with self._lock:
            self._since = self._since if self._working else time.monotonic()
            self._working += 1

    def end(self, nbytes: int) -> None:
        """They are done, or failed, which counts as none."""
        with self._lock:
            now = time.monotonic()
            self._working -= 1
            self._bytes, self._seconds = self._bytes + nbytes, self._seconds + (now - self._since) * (nbytes > 0)
            self._since = now
            if self._bytes > WINDOW:
                self._bytes, self._seconds = self._bytes / 2, self._seconds / 2

    @contextmanager
    def reading(self, run: Run) -> Iterator[None]:
        """Around one thread's work on a run."""
        self.begin()
        read = 0
        try:
            yield
            read = sum(extent.nbytes for extent in run.extents)
        finally:
            self.end(read)


class Reader:
    """Keeps files open, so one that is replaced later is never mixed in; of one that is written to, nothing lands any
    more. One owner's."""

    def __init__(self, staging_bytes: int, threads: int = 1, direct: bool = True, patience: float = PATIENCE) -> None:
        """`staging_bytes` is the size of one thread's buffer; it bounds the length of a single request."""
        size = max(4 * ALIGN, staging_bytes // ALIGN * ALIGN)
        self._longest = size - 2 * ALIGN  # room for the alignment at both ends
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._patience, self._pulse = patience, Pulse()
        self.meter = Meter()
        self._files: dict[Path, _File] = {}
        self._lock = threading.Lock()
        self._transfers: list[Transfer] = []  # the most urgent first
        self._work = threading.Condition()
        self._closed = False
        self._staging = [_aligned(size) for _ in range(threads)]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and close the files. A thread that the disk holds keeps its files until it comes back."""
        with self._work:
            self._closed = True
            transfers, self._transfers = self._transfers, []
            self._work.notify_all()
        for transfer in transfers:
            transfer.cancel()
        until = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            for file in self._files.values():
                file.close()
            self._files.clear()

    def hold(self, files: Mapping[Path, Identity]) -> None:
        """Open these now: what is put in their place later is never read. Raises CheckpointError, or ShardChanged for
        one that is not the file, in the state, that its identity is of."""
        with self._lock:
            for path, identity in files.items():
                assert path not in self._files, path
                self._files[path] = _File(path, self._direct, identity)

    @property
    def access(self) -> Access:
        """Of the files that are open; some systems refuse as late as at the first read. Callable from any thread."""
        with self._lock:
            files = list(self._files.values())
        if not any(file.refusal for file in files):
            return Access("direct")
        first = next(file for file in files if file.refusal)
        name = "buffered" if all(file.refusal for file in files) else "mixed"
        return Access(name, f"{first.path.name}: {first.refusal}")

    def read(self, extents: Sequence[Extent]) -> ReadReport:
        """Fill every extent. Raises CheckpointError naming file, offset, wanted and got: then trust nothing of them."""
        transfer = self.start([extents], True)
        try:
            transfer.wait_all()
        except BaseException:
            transfer.cancel()
            raise
        return ReadReport(sum(extent.nbytes for extent in extents), transfer.read, transfer.seconds)

    def start(
        self, groups: Sequence[Sequence[Extent]], urgent: bool = False, changed: threading.Condition | None = None
    ) -> Transfer:
        """Begin to fill every extent, group by group, and return at once. What is urgent overtakes what is not.

        `changed` is notified of all that happens to it: one for several lets the owner wait for any of them.
        """
        runs = [list(coalesce(extents, self._longest)) for extents in groups]
        for run in (run for group in runs for run in group):
            self._file(run.file)  # a file that is not there is an error of the caller's, now
        transfer = Transfer(runs, self._pulse, self._patience, changed)
        with self._work:
            assert not self._closed, "a read after close"
            self._transfers.insert(0 if urgent else len(self._transfers), transfer)
            self._begin_threads()
            self._work.notify_all()
        return transfer

    def hurry(self, transfer: object) -> None:
        """If it is one of this reader's, it overtakes all others that still wait for a thread."""
        with self._work:
            for mine in [mine for mine in self._transfers if mine is transfer]:
                self._transfers.remove(mine)
                self._transfers.insert(0, mine)

    def _begin_threads(self) -> None:
        """At the first read: a reader that is never used costs no thread."""
        if not self._threads:
            for staging in self._staging:
                self._threads.append(
                    threading.Thread(target=self._serve, args=(staging,), name="moepager-read", daemon=True)
                )
                self._threads[-1].start()

    def _serve(self, staging: Bytes) -> None:
        """One thread's life."""
        while (job := self._next()) is not None:
            transfer, group, run = job
            try:
                with self.meter.reading(run):
                    transfer.land(group, run, self._file(run.file).fetch(run, staging))
            except BaseException as error:  # handed to whoever waits, as a future would; the thread lives on
                transfer.fail(error)

    def _next(self) -> tuple[Transfer, int, Run] | None:
        with self._work:
            while not self._closed:
                while self._transfers:
                    if taken := self._transfers[0].take():
                        return self._transfers[0], *taken
                    self._transfers.pop(0)
                self._work.wait()
        return None

    def _file(self, path: Path) -> _File:
        with self._lock:
            if path not in self._files:
                self._files[path] = _File(path, self._direct)
            return self._files[path]


class _File:
    """One open file and the way it is read: direct until the file system says no, then buffered."""

    def __init__(self, path: Path, direct: bool, identity: Identity | None = None) -> None:
        """Without an identity, what is found at `path` now is taken."""
        self.path = path
        self.refusal = None if direct else "direct reads were not asked for, or this system has none"
        self._buffered = _open(path, 0)
        self._direct: int | None = None
        try:
            self._identity = identity or Identity.of(self._buffered)
            self._identity.check(path, self._buffered)
            if direct:
                self._open_direct()
        except BaseException:
            self.close()
            raise

    def _open_direct(self) -> None:
        try:
            self._direct = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:
                raise _unreadable(self.path, error) from error
            self.refusal = f"its file system opens no file for direct reads ({error.strerror})"
        else:
            self._identity.check(self.path, self._direct)

    def close(self) -> None:
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)

    def fetch(self, run: Run, staging: Bytes) -> Fetched:
        """The run's bytes in `staging`, and how they lie there. Raises ShardChanged where they may be of another state
        of the file: compared after the read, for a write may begin at any time before it ends."""
        try:
            return self._fetch(run, staging)
        finally:
            self._identity.check(self.path, self._buffered)

    def _fetch(self, run: Run, staging: Bytes) -> Fetched:
        if self._direct is not None and self.refusal is None:
            try:
                return self._fetch_direct(self._direct, run, staging)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise _failed(run, error) from error
                # The descriptor stays open: another thread may be reading from it.
                self.refusal = f"its file system refuses direct reads ({error.strerror})"
        return self._fetch_buffered(run, staging)

    def _fetch_direct(self, descriptor: int, run: Run, staging: Bytes) -> Fetched:
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
        return Fetched(staging, start, got)

    def _fetch_buffered(self, run: Run, staging: Bytes) -> Fetched:
        length, got = run.end - run.start, 0
        while got < length:
            try:
                n = os.preadv(self._buffered, [staging[got:length]], run.start + got)  # type: ignore[list-item]
            except OSError as error:
                raise _failed(run, error) from error
            if n == 0:
                raise _short(run, run.start + got)
            got += n
        os.posix_fadvise(self._buffered, run.start, length, os.POSIX_FADV_DONTNEED)
        return Fetched(staging, run.start, got)


def coalesce(extents: Iterable[Extent], longest: int) -> Iterator[Run]:
    """Sort by place and merge neighbours into runs of at most `longest` bytes; a longer extent becomes several runs."""
    held: list[Extent] = []
    for extent in sorted(_split(extents, longest), key=lambda e: (os.fspath(e.file), e.offset)):
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


def _run(extents: Sequence[Extent]) -> Run:
    end = max(extent.offset + extent.nbytes for extent in extents)
    return Run(extents[0].file, extents[0].offset, end, tuple(extents))


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


def _failed(run: Run, error: OSError) -> DiskError:
    return DiskError(
        f"Reading {run.end - run.start} bytes of {run.file} at offset {run.start} failed: {error.strerror}. "
        "Check the disk, then the file."
    )


def _short(run: Run, end: int) -> CheckpointError:
    return CheckpointError(
        f"{run.file} ends early: wanted {run.end - run.start} bytes at offset {run.start}, "
        f"got {max(0, end - run.start)}. Put the whole file back and open the model again."
    )
