"""`moepager` on a disk that fails and stalls when it is told to: `python -m benchmarks.faulty_server FILE serve ...`.

FILE holds one word that counts for every read of experts while it stands there: `eio` or `stall`.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from service.cli import main

EIO, STALL = "eio", "stall"
STALL_SECONDS = 0.3  # of each read

Preadv = Callable[[int, Sequence[Any], int], int]


def faulty(control: Path, real: Preadv) -> Preadv:
    """`real`, but for what the file says. Without a file nothing is wrong."""

    def preadv(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        try:
            word = control.read_text()
        except FileNotFoundError:
            word = ""
        if word == EIO:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if word == STALL:
            time.sleep(STALL_SECONDS)
        return real(descriptor, buffers, offset)

    return preadv


if __name__ == "__main__":
    os.preadv = faulty(Path(sys.argv.pop(1)), os.preadv)  # type: ignore[assignment]  # engine.reader reads by it
    main()
