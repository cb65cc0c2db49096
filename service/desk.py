"""Work for clients that is no query, such as embeddings: a thread of its own, a bounded queue, a deadline, an end.

Queries are prepared in other threads, so however much is asked for here, none of them waits behind it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastapi import Request

from store.errors import Busy, InvalidInput, TimedOut

T = TypeVar("T")

PLACES = 8  # calls that run or wait


class Stop:
    """Asked between two pieces of work, in the thread that does it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.gone = threading.Event()  # nobody waits for the rest
        self._deadline = time.monotonic() + seconds

    def check(self) -> None:
        """Raises Busy where nobody waits any more, TimedOut where the time is over."""
        if self.gone.is_set():
            raise Busy("The client went away before the work was done.")
        if time.monotonic() > self._deadline:
            raise self.late()

    def late(self) -> TimedOut:
        return TimedOut(
            f"The work was not done within {self.seconds:g} s. Send less in one call, try when the service is less "
            "busy, or raise MOEPAGER_REQUEST_TIMEOUT."
        )


class Desk:
    """One thread that does calls in the order in which they came. Belongs to the event loop that awaits `run`."""

    def __init__(self, name: str, places: int = PLACES) -> None:
        self._name, self._places = name, places
        self._taken = 0
        self._thread = ThreadPoolExecutor(1, f"moepager-{name}")

    async def run(self, work: Callable[[Stop], T], request: Request, seconds: float) -> T:
        """What `work` gives. Raises Busy at once where all places are taken, and TimedOut; whatever ends it early, a
        client that hangs up too, stops `work` where it next looks."""
        if self._taken >= self._places:
            raise Busy(f"{self._taken} calls for {self._name} run or wait already, and no more may. Try again shortly.")
        self._taken += 1
        stop = Stop(seconds)
        done = asyncio.wrap_future(self._thread.submit(work, stop))
        watch = asyncio.create_task(_stop_when_gone(request, stop, done))
        try:
            async with asyncio.timeout(seconds):
                return await done
        except TimeoutError:
            raise stop.late() from None
        except asyncio.CancelledError:
            if not stop.gone.is_set():
                raise  # the server ends this task; else it was the client's leaving that cancelled the work
            stop.check()
            raise
        finally:
            watch.cancel()
            stop.gone.set()
            self._taken -= 1


async def _stop_when_gone(request: Request, stop: Stop, done: asyncio.Future[T]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stop.gone.set()
    done.cancel()


def refuse_longer(length: int, most: int, unit: str, param: str) -> None:
    """Raises InvalidInput where a call has more than `most` of what `unit` names."""
    if length > most:
        raise InvalidInput(
            f"`{param}` has {length} {unit}, and one call may have {most}. Send it in several calls.", param=param
        )
