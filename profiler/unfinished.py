"""Arrays of work that is not finished, on disk, so that a killed run goes on where it was.

A file is written beside and renamed, so it is whole or absent; it is read again only by the work that wrote it.
"""

from __future__ import annotations

import errno
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from store.errors import BudgetError
from store.sizes import show_bytes

Arrays = Mapping[str, npt.NDArray[np.generic]]

SAVE_AFTER = 1.0  # seconds of work that a killed run may lose; a save takes as long as a small shard


class Unfinished:
    """One file. `plan` says what the work depends on: under another plan there is nothing to go on with."""

    def __init__(self, folder: Path, name: str, plan: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, name
        self._path = folder / f"{name}.npz"
        self._plan = plan
        self._saved = time.monotonic()

    def part(self, name: str) -> Unfinished:
        """Of work that belongs to this one and has a file of its own."""
        return Unfinished(self.folder, f"{self.name}.{name}", self._plan)

    def load(self) -> dict[str, npt.NDArray[np.generic]] | None:
        """What was saved last; None where that is nothing, of other work, or damaged: nothing but work is lost."""
        if not self._path.exists():
            return None
        try:
            with self._path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = dict(stored)
            return arrays if str(arrays.pop("plan")) == self._plan else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, arrays: Arrays) -> None:
        """Raises BudgetError where the disk is full; what was saved before stays."""
        beside = self._path.with_suffix(".partial")
        try:
            with beside.open("wb") as file:
                np.savez(file, allow_pickle=False, plan=np.str_(self._plan), **arrays)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                size = sum(array.nbytes for array in arrays.values())
                raise BudgetError(
                    f"What a run has finished takes {show_bytes(size)} in {self.folder}, twice while it is saved, and "
                    "the disk is full. Make room, or set MOEPAGER_HOME to a larger disk; what the run has finished is "
                    "kept."
                ) from error
            raise
        self._saved = time.monotonic()

    def save_in_time(self, arrays: Callable[[], Arrays]) -> None:
        """As `save`, if the last one is long ago."""
        if time.monotonic() - self._saved >= SAVE_AFTER:
            self.save(arrays())

    def forget(self) -> None:
        """This file and those of its parts."""
        for path in (self._path, *self.folder.glob(f"{self.name}.*.npz")):
            path.unlink(missing_ok=True)


class Nowhere(Unfinished):
    """Work that is done in one piece."""

    def __init__(self) -> None:
        pass

    def part(self, _: str) -> Unfinished:
        return self

    def load(self) -> None:
        return None

    def save(self, _: Arrays) -> None:
        pass

    def save_in_time(self, _: Callable[[], Arrays]) -> None:
        pass

    def forget(self) -> None:
        pass


NOWHERE = Nowhere()
