"""Cold means cold: evict a file from the page cache and ask the kernel whether it is gone."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

from store.errors import MoepagerError

PAGE = mmap.PAGESIZE
TRIES = 5
WAIT = 0.05  # seconds, longer each time


def evict(files: Iterable[Path]) -> None:
    """Drop `files` from the page cache. Raises if pages stay, for then nothing measured after it is cold.

    Asked a few times: pages that the kernel is still reading ahead for somebody who has left stay once.
    """
    for path in files:
        for attempt in range(TRIES):
            _drop(path)
            left = resident_pages(path)
            if not left:
                break
            time.sleep(WAIT * attempt)
        else:
            raise MoepagerError(
                f"{left} pages of {path.name} stay in the page cache, so nothing is cold. Is another process using it?"
            )


def _drop(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def resident_pages(path: Path) -> int:
    """How many pages of the file are in the page cache, by mincore(2)."""
    size = path.stat().st_size
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as view,
    ):
        anchor = ctypes.c_char.from_buffer(view)
        pages = (size + PAGE - 1) // PAGE
        answer = (ctypes.c_ubyte * pages)()
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), answer)
        del anchor
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
    return sum(byte & 1 for byte in answer)
