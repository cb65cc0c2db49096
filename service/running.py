"""Waiting for answers: submitted prompts, their events as they come, timeouts, and clients that hang up.

The device belongs to the engine's own thread; here is only waiting and cancelling.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

from fastapi import Request

from engine.requests import Event, FinishedEvent, SwapCost
from engine.worker import TokenStream
from service.access_log import log_query
from service.answer import Prepared, make_receipt
from service.discovery import Discovery
from service.metrics import Metrics
from service.parts import Parts
from service.receipt import Receipt
from service.tracing import Trail
from store.errors import Busy, TimedOut
from store.records import Selection


class Running:
    """A submitted prompt. `cancel` may be called at any time, from any thread, and more than once."""

    def __init__(
        self,
        prepared: Prepared,
        stream: TokenStream,
        metrics: Metrics,
        discovery: Discovery,
        timeout: float,
        here: Callable[[], int],
        began: float,
    ) -> None:
        self.prepared = prepared
        self._here = here  # how many of the experts that it will use are in memory
        self._stream = stream
        self._metrics = metrics
        self._discovery = discovery
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._submitted = time.monotonic()
        self._asked = began  # when its body was read, of the monotonic clock
        self._begun = False
        self._told = False
        self._trail = Trail()

    @property
    def predicted(self) -> SwapCost | None:
        """What it would wait for, as things stood when it was submitted."""
        return self._stream.predicted

    def progress(self) -> tuple[int, int] | None:
        """How many of its experts are in memory, and of how many; None where it waits for none."""
        selection = self.prepared.request.selection
        if self._begun or selection is None or (here := self._here()) == len(selection):
            return None
        return here, len(selection)

    def cancel(self) -> None:
        """Harmless once it has ended; before, it is the end."""
        self._stream.cancel()
        self._tell("cancelled")

    def listen(self, ring: Callable[[bool], None]) -> None:
        """`ring` is called from another thread whenever `taken` has something, with whether that is the end."""
        self._stream.listen(ring)

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def taken(self) -> list[Event]:
        """What has come since the last look: tokens, at the end one FinishedEvent, which is then for `ended`.

        Raises TimedOut, having cancelled, where nothing has come and the request's time is over, and what the engine
        failed with.
        """
        try:
            events = self._stream.taken()
        except Exception:  # whatever it is, it is an end too, and goes on to the client
            self._tell("error")
            raise
        if not events and self.seconds_left <= 0:
            self._time_is_over()
        self._begun = self._begun or bool(events)
        return events

    async def finish(self) -> FinishedEvent:
        """The end alone, for those who need no token before it; raises as `taken` does."""
        try:
            async with asyncio.timeout(self.seconds_left):
                finished = await self._stream.last()
        except TimeoutError:
            self._time_is_over()
        except Exception:
            self._tell("error")
            raise
        self.ended(finished)
        return finished

    def _time_is_over(self) -> NoReturn:
        self._tell("timeout")
        self.cancel()
        raise TimedOut(
            f"The answer was not finished within {self._timeout:g} s. Ask for fewer tokens, try when the "
            "service is less busy, or raise MOEPAGER_REQUEST_TIMEOUT."
        ) from None

    def ended(self, finished: FinishedEvent) -> None:
        """Count and log the end. Raises Busy where the answer was broken off."""
        self._tell(finished.reason, finished)
        if finished.reason == "cancelled":
            raise Busy("The answer was cancelled before it was finished: the service is stopping. Try again.")

    def _tell(self, outcome: str, finished: FinishedEvent | None = None) -> None:
        """Count and log the end, once."""
        if self._told:
            return
        self._told = True
        task = self.prepared.serving.retrieval.task
        self._metrics.ended(task, self.prepared.serving.mode, outcome)
        if finished is not None:
            self._metrics.finished(task, finished, self._each(finished))
            self._discovery.served(self.prepared.serving, finished)
        self._trail.ended(self.prepared, outcome, finished)
        log_query(self.prepared, outcome, finished, time.monotonic() - self._asked)

    def _each(self, finished: FinishedEvent) -> float | None:
        """Seconds a token, of those after the first."""
        further = finished.completion_tokens - 1
        since_first = time.monotonic() - self._submitted - finished.served.ttft_ms / 1000
        return since_first / further if further > 0 else None

    def receipt(self, finished: FinishedEvent) -> Receipt:
        return make_receipt(self.prepared, finished)


def submit(prepared: Sequence[Prepared], parts: Parts, began: float) -> list[Running]:
    """Submit all at once, or none: Busy where the queue has no room for all."""
    running: list[Running] = []
    for one, stream in zip(prepared, parts.worker.submit_all([one.request for one in prepared]), strict=True):
        parts.streams.add(stream)
        parts.metrics.submitted(stream, one.serving.retrieval.task)
        here = partial(_in_memory, parts, one.request.selection)
        timeout = parts.settings.request_timeout
        running.append(Running(one, stream, parts.metrics, parts.discovery, timeout, here, began))
    return running


def cancel_all(running: Sequence[Running]) -> None:
    for one in running:
        one.cancel()


async def finish_all(request: Request, running: Sequence[Running]) -> list[FinishedEvent]:
    """Wait for every answer. Whatever ends this early (error, timeout, a client that is gone) cancels all of them."""
    watch = asyncio.create_task(_cancel_when_gone(request, running))
    try:
        if len(running) == 1:  # the usual case, without a task of its own
            return [await running[0].finish()]
        return await asyncio.gather(*(one.finish() for one in running))
    finally:
        watch.cancel()
        cancel_all(running)


async def _cancel_when_gone(request: Request, running: Sequence[Running]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    cancel_all(running)


def _in_memory(parts: Parts, selection: Selection | None) -> int:
    """As things are at this moment, by a look that disturbs nobody."""
    return sum(parts.engine.bank.holds((key,)) for key in selection or ())
