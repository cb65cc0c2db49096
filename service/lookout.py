"""A thread that looks for work, again and again, and sooner when it is woken. What the work is, it does not know."""

from __future__ import annotations

import threading
from collections.abc import Callable

IDLE_SECONDS = 1.0  # between two looks that found nothing


class Lookout:
    """`look` is handed the event that ends it, and says whether to look again at once. It raises nothing."""

    def __init__(self, name: str, look: Callable[[threading.Event], bool]) -> None:
        self._look = look
        self._stop, self._woken = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        """Once the look under way has ended."""
        self._stop.set()
        self._woken.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.is_set():
            if not self._look(self._stop):
                self._woken.wait(IDLE_SECONDS)
                self._woken.clear()
