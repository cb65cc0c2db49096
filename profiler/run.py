"""A run's partial statistics on disk, so that a killed run goes on where it was. Owns the folder and its lock.

A file is written beside and renamed, so it is whole or absent; it is read again only by the run that wrote it.
"""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from profiler.statistics import Statistics
from store.errors import BudgetError, CorruptStore, Held
from store.sizes import show_bytes


class Run:
    """The partial statistics of one profile. `plan` says how the text is cut: another cut adds up in another order."""

    def __init__(self, folder: Path, profile: str, plan: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, profile
        self._path = folder / f"{profile}.npz"
        self._plan = plan

    def load(self) -> tuple[int, Statistics] | None:
        """How many shards (or layers, where the pass streams) are summed up, and their sum; None for a fresh start."""
        if not self._path.exists():
            return None
        try:
            with self._path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = dict(stored)
            if str(arrays.pop("plan")) != self._plan:
                return None
            return int(arrays.pop("shards")), Statistics.from_arrays(arrays)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, CorruptStore):
            return None  # nothing but work is lost: the shards are run again

    def save(self, shards: int, statistics: Statistics) -> None:
        """Raises BudgetError where the disk is full; what was saved before stays."""
        beside = self._path.with_suffix(".partial")
        try:
            with beside.open("wb") as file:
                np.savez(
                    file, allow_pickle=False, plan=np.str_(self._plan), shards=np.int64(shards), **statistics.arrays
                )
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                size = sum(array.nbytes for array in statistics.arrays.values())
                raise BudgetError(
                    f"The partial sums of the pass take {show_bytes(size)} in {self.folder}, twice while they are "
                    "saved, and the disk is full. Make room, or set MOEPAGER_HOME to a larger disk; what the run has "
                    "finished is kept."
                ) from error
            raise

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)


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
