"""A disk that tests hold, slow down and break."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Sequence
from typing import Any


class Disk:
    """Stands in for preadv. While the gate is closed every read waits; `fails` reads, once begun, are I/O errors."""

    def __init__(self) -> None:
        self.gate, self.asked = threading.Event(), threading.Event()
        self.gate.set()
        self.fails = 0
        self.dawdles = 0.0
        self._real, self._lock = os.preadv, threading.Lock()

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        self.asked.set()
        self.gate.wait(20)
        time.sleep(self.dawdles)
        with self._lock:
            fails, self.fails = self.fails > 0, self.fails - 1
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._real(descriptor, buffers, offset)

    def hold(self) -> None:
        self.asked.clear()
        self.gate.clear()
