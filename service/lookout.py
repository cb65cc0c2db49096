"""A thread that looks for work, again and again, and sooner when it is woken. What the work is, it does not know."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger("moepager.service")

IDLE_SECONDS = 1.0  # between two looks that found nothing


class Lookout:
    """`look` is handed the event that ends it, and says whether to look again at once. What it raises is logged, and
    the looking goes on."""

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
            if not self._looked():
                self._woken.wait(IDLE_SECONDS)
                self._woken.clear()

    def _looked(self) -> bool:
        try:
            return self._look(self._stop)
        except Exception:  # a bug in one look must not end all looks in silence
            log.exception("%s: a look failed; the next one follows", self._thread.name)
            return False
