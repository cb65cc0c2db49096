"""The highest of what memory counters said, looked at in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable

INTERVAL = 0.01  # seconds between two looks


class Watch:
    """The highest of two counters, anonymous memory and page cache, seen while the block runs."""

    def __init__(self, held: Callable[[], tuple[int, int]], interval: float = INTERVAL) -> None:
        self._held, self._interval, self._over = held, interval, threading.Event()
        self._thread = threading.Thread(target=self._look, name="memory-watch", daemon=True)
        self.anon = self.cache = 0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            anon, cache = self._held()
            self.anon, self.cache = max(self.anon, anon), max(self.cache, cache)
            if self._over.wait(self._interval):
                return
