"""A query from the moment when its body is read: one that is refused before it runs is counted and logged, too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from service.access_log import log_refused
from service.callers import Caller
from service.metrics import NO_MODE
from service.parts import Parts
from store.errors import Busy, MoepagerError


@contextmanager
def asking(name: str, caller: Caller, parts: Parts) -> Iterator[float]:
    """Gives the moment when it began, of the monotonic clock. What is raised inside is the query's end: one line, one
    count, however many answers it asked for."""
    began = time.monotonic()
    try:
        yield began
    except Exception as error:  # whatever it is, it is an end, and goes on to the client
        outcome = outcome_of(error)
        parts.metrics.ended(None, NO_MODE, outcome)
        code = error.code if isinstance(error, MoepagerError) else MoepagerError.code
        log_refused(name, caller.owner, outcome, code, time.monotonic() - began)
        raise


def outcome_of(error: Exception) -> str:
    if isinstance(error, Busy):
        return "busy"
    return "refused" if isinstance(error, MoepagerError) and error.status < 500 else "error"
