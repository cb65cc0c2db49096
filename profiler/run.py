"""A run's partial statistics on disk, so that a killed run goes on where it was, and the lock of its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from profiler.statistics import Statistics
from profiler.unfinished import Arrays, Unfinished
from store.errors import CorruptStore, Held


class Run:
    """The partial statistics of one profile. `plan` says how the text is cut: another cut adds up in another order."""

    def __init__(self, folder: Path, profile: str, plan: str) -> None:
        self.folder, self.name = folder, profile
        self._unfinished = Unfinished(folder, profile, plan)

    def load(self) -> tuple[int, Statistics] | None:
        """How many shards (or layers, where the pass streams) are summed up, and their sum; None for a fresh start."""
        arrays = self._unfinished.load()
        if arrays is None or "shards" not in arrays:
            return None
        shards = int(arrays.pop("shards").item())
        try:
            return shards, Statistics.from_arrays(arrays)
        except CorruptStore:
            return None  # of another version: nothing but work is lost

    def save(self, shards: int, statistics: Statistics) -> None:
        """Raises BudgetError where the disk is full; what was saved before stays."""
        self._unfinished.save(_arrays(shards, statistics))

    def save_in_time(self, shards: int, statistics: Statistics) -> None:
        """As `save`, if the last one is long ago."""
        self._unfinished.save_in_time(lambda: _arrays(shards, statistics))

    def forget(self) -> None:
        """And what else is unfinished of the same profile."""
        self._unfinished.forget()


def _arrays(shards: int, statistics: Statistics) -> Arrays:
    return {"shards": np.asarray(shards), **statistics.arrays}


@contextmanager
def hold(folder: Path, name: str) -> Iterator[None]:
    """Only one process may hold a name. Raises Held at once if another does; a dead process holds nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Held(
            f"Another run is profiling the same task of the same model (it holds {lock.lock_file}). Wait for it to end."
        ) from error
    try:
        yield
    finally:
        lock.release()
