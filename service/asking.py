"""A query from the moment when its body is read: one that is refused before it runs is counted and logged, too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NamedTuple

from fastapi import Depends, Request

from service.access_log import log_refused
from service.callers import Caller, caller_of
from service.context import parts_of, request_id
from service.metrics import NO_MODE
from service.parts import Parts
from store.errors import Busy, MoepagerError


class Asker(NamedTuple):
    """A request's id, who sent it, and the parts that are there for them."""

    name: str
    caller: Caller
    parts: Parts


async def asker_of(request: Request) -> Asker:  # no thread: see context.py
    """All three at once: a dependency takes the framework longer to call than it takes."""
    return Asker(request_id(request), caller_of(request), parts_of(request))


AskerDep = Annotated[Asker, Depends(asker_of)]


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
