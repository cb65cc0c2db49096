"""How long a PostgreSQL that says nothing is waited for. A killed server is noticed at once; one that hangs, or whose
network swallows everything, would hold its callers for ever: TCP alone does not tell the two from slow work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg

from store.errors import StoreUnreachable

T = TypeVar("T")

SILENCE_SECONDS = 8.0  # together with the time to connect less than the age at which a job's row is taken for dead
RETRY_SECONDS = 1.0


class Silent(psycopg.OperationalError):
    """The server took a statement and said nothing for too long."""


class PatientConnection(psycopg.Connection[Any]):
    """Gives up, and closes itself, after `patience` seconds without a byte of the server's."""

    patience = SILENCE_SECONDS

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        return super().wait(self._bounded(gen), *args, **kwargs)

    def _bounded(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        """The driver's own steps. It sends 0 each time that nothing was ready for a moment."""
        heard = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if ready:
                    heard = time.monotonic()
                elif time.monotonic() - heard > self.patience:
                    self.pgconn.finish()
                    raise Silent(f"the server has not answered for {self.patience:g} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            value: T = end.value
            return value


class Breaker:
    """After one caller has waited in vain, the others are refused at once, and one at a time tries whether it answers
    again. Otherwise a server that hangs would hold every thread of the service."""

    def __init__(self) -> None:
        self._said: str | None = None
        self._again = 0.0  # when it may be tried
        self._answered = 0.0  # when it last did
        self._trying = threading.Lock()

    @contextmanager
    def passing(self) -> Iterator[float]:
        """Gives the time, for `trip`. Raises StoreUnreachable where another has just waited in vain."""
        began = time.monotonic()
        if self._said is None:
            yield began
            self._answered = time.monotonic()
            return
        if began < self._again or not self._trying.acquire(blocking=False):
            raise StoreUnreachable(self._said)
        try:
            yield began
            self._answered, self._said = time.monotonic(), None
        finally:
            self._trying.release()

    def trip(self, said: str, began: float) -> None:
        """Whoever began at `began` has waited in vain, unless somebody was answered since then."""
        if self._answered < began:
            self._said, self._again = said, time.monotonic() + RETRY_SECONDS
