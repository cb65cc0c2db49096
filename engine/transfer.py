"""Reads under way: groups of runs that land one after the other, failing together. Knows no files and no descriptors.

The owner starts a transfer and waits for groups of it; reading threads take runs and land their bytes. Once a transfer
has failed or was cancelled, nothing is written into the owner's memory any more, not even by a read that comes back
late: bytes pass through the thread's own buffer first.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from store.errors import CheckpointError, DiskError

Bytes = npt.NDArray[np.uint8]


class Extent(NamedTuple):
    """A range of a file and where its bytes go: `into` is u8 [nbytes], writable and contiguous."""

    file: Path
    offset: int
    nbytes: int
    into: Bytes


class Run(NamedTuple):
    """Neighbouring extents of one file that one request covers, from byte `start` up to `end`."""

    file: Path
    start: int
    end: int
    extents: tuple[Extent, ...]


class Fetched(NamedTuple):
    """A thread's buffer after a read: its first byte is byte `start` of the file, `read` bytes were asked of it."""

    staging: Bytes
    start: int
    read: int


class Pulse:
    """When a read last came back, for all transfers of a reader: a queue that moves is not a disk that stalls."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def beat(self) -> None:
        self.last = time.monotonic()


class Transfer:
    """`wait` and `cancel` are the owner's; `take`, `land` and `fail` the threads'."""

    def __init__(
        self, groups: Sequence[Sequence[Run]], pulse: Pulse, patience: float,
        changed: threading.Condition | None = None,
    ) -> None:  # fmt: skip
        """`patience` is the longest, in seconds, that one request may take before the disk counts as stalled.

        `changed` may be shared by transfers of one owner.
        """
        self.read = 0
        self.seconds = 0.0  # from start to the last byte that landed
        self._left = [len(runs) for runs in groups]
        self._queue = deque((group, run) for group, runs in enumerate(groups) for run in runs)
        self._runs = len(self._queue)
        self._changed = changed or threading.Condition()
        self._under_way: dict[int, tuple[float, Run]] = {}  # by thread: since when
        self._copying = 0
        self._error: BaseException | None = None
        self._given_up = False
        self._pulse, self._patience = pulse, patience
        self._started = time.monotonic()

    @property
    def begun(self) -> bool:
        """Whether anything of it was asked of the disk."""
        return len(self._queue) < self._runs

    @property
    def landed(self) -> bool:
        """Whether all of it is there."""
        return not any(self._left)

    @property
    def over(self) -> bool:
        """Whether nothing more will land: all of it is there, or it failed."""
        return self._error is not None or self.landed

    def has(self, group: int) -> bool:
        return not self._left[group]

    @property
    def failure(self) -> BaseException | None:
        """What made it fail, a disk that stalls included; None where it goes on, has landed, or was given up."""
        with self._changed:
            if self._error is None and not self.landed and (late := self._stalled()):
                self._stop(late)
            return None if self._given_up else self._error

    def wait(self, group: int, seconds: float = inf) -> bool:
        """Whether the group is there, after at most `seconds`. Raises what made the transfer fail; a disk that stalls
        fails it."""
        if not self._left[group]:
            return True
        until = time.monotonic() + seconds
        with self._changed:
            while self._left[group]:
                if self._error is None and (late := self._stalled()):
                    self._stop(late)
                if self._error is not None:
                    self._stop(self._error)
                    raise self._error
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(min(self._patience / 4, left))
        return True

    def wait_all(self) -> None:
        for group in range(len(self._left)):
            self.wait(group)

    def cancel(self) -> None:
        """Nothing is read or written any more, but for requests that the disk has already: those are dropped."""
        with self._changed:
            if not self.landed:
                self._given_up = self._error is None
                given_up = CheckpointError("The read was given up, because nobody waits for it any more.")
                self._stop(self._error or given_up)

    def take(self) -> tuple[int, Run] | None:
        """The next run to read, None if there is none."""
        with self._changed:
            if not self._queue:
                return None
            group, run = self._queue.popleft()
            self._under_way[threading.get_ident()] = (time.monotonic(), run)
            return group, run

    def land(self, group: int, run: Run, fetched: Fetched) -> None:
        """Copy a run's bytes to where they belong, unless it is too late for that."""
        with self._changed:
            self._came_back()
            if self._error is not None:
                return
            self._copying += 1
        copied = False
        try:
            for extent in run.extents:
                at = extent.offset - fetched.start
                np.copyto(extent.into, fetched.staging[at : at + extent.nbytes])
            copied = True
        finally:  # whoever stops the transfer waits for copies under way: one that fails has ended, too
            with self._changed:
                self._copying -= 1
                if copied:
                    self.read += fetched.read
                    self._left[group] -= 1
                    self.seconds = time.monotonic() - self._started
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._came_back()
            if self._error is None:
                self._error = error
                self._queue.clear()
            self._changed.notify_all()

    def _came_back(self) -> None:
        self._under_way.pop(threading.get_ident(), None)
        self._pulse.beat()

    def _stop(self, error: BaseException) -> None:
        """With the lock held: no run is taken any more, none lands, and copies under way have ended."""
        self._error = error
        self._queue.clear()
        self._changed.wait_for(lambda: not self._copying)
        self._changed.notify_all()

    def _stalled(self) -> CheckpointError | None:
        """Why the owner has waited long enough: a request that does not come back, or none that is even begun."""
        now = time.monotonic()
        for since, run in self._under_way.values():
            if now - since > self._patience:
                return _stall(run, now - since)
        idle = now - max(self._pulse.last, self._started)
        if self._queue and not self._under_way and idle > self._patience:
            return _stall(self._queue[0][1], idle)
        return None


def _stall(run: Run, seconds: float) -> DiskError:
    return DiskError(
        f"The disk stalls: {run.end - run.start} bytes of {run.file} at offset {run.start} have not come for "
        f"{seconds:.3g} seconds. Check the disk, then send the request again; what is in memory is still served."
    )
