"""One thread owns the device; everybody else waits on a stream. Admits waiting requests to the running batch.

Knows when to ask the scheduler and whom to tell, not how to generate nor what is best next.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import count
from math import inf
from types import TracebackType
from typing import Generic, TypeVar

from engine.engine import Engine
from engine.generate import Batch
from engine.requests import Event, FailedEvent, FinishedEvent, GenerationRequest, Served, Submission
from engine.scheduler import Rules, Scheduler, Waiting
from engine.stream import TokenStream
from store.errors import Busy, MoepagerError
from store.records import Selection

__all__ = ["EngineWorker", "TokenStream"]

T = TypeVar("T")

REST_SECONDS = 0.05  # between two looks at requests that nothing can be done for yet


@dataclass(frozen=True, slots=True)
class _Call(Generic[T]):
    """Something else to do on the device's thread, once everything that was asked for earlier is done."""

    function: Callable[[Engine], T]
    future: Future[T]
    order: int

    def run(self, engine: Engine) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function(engine))
        except BaseException as error:
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Room:
    """The scheduler's view of a batch."""

    engine: Engine
    batch: Batch

    @property
    def idle(self) -> bool:
        return not len(self.batch)

    @property
    def may_swap(self) -> bool:
        return self.batch.may_swap

    @property
    def free_rows(self) -> int:
        return self.batch.free_rows

    def fits(self, selection: Selection | None) -> bool:
        return self.batch.fits(selection)

    def swap_seconds(self, selection: Selection | None) -> float:
        return self.engine.admission.swap_seconds(selection)

    def share_beside(self, selection: Selection, other: Selection) -> float:
        return self.engine.admission.share_beside(selection, other)


class EngineWorker:
    """Owns the thread, not the engine: whoever opened the engine closes it, after the worker."""

    def __init__(self, engine: Engine, queue_size: int = 64, rules: Rules | None = None) -> None:
        self._engine = engine
        self._queue_size = queue_size
        self._scheduler: Scheduler[TokenStream] = Scheduler(rules)
        self._calls: deque[_Call[object]] = deque()
        self._orders = count()
        self._changed = threading.Condition()
        self._closing = False
        self._running: dict[int, TokenStream] = {}
        self._thread = threading.Thread(target=self._loop, name="moepager-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests and calls that have not begun."""
        return len(self._scheduler) + len(self._calls)

    def queued(self) -> list[TokenStream]:
        """The requests that have not begun, as they are at this moment."""
        return self._scheduler.jobs()

    @property
    def running(self) -> int:
        """Requests of the batch that is being generated."""
        return len(self._running)

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Queue a request.

        Raises at once: InvalidInput or BudgetError if it can't ever be served, Busy if the queue is full.
        """
        [stream] = self.submit_all([request])
        return stream

    def submit_all(self, requests: Sequence[GenerationRequest]) -> list[TokenStream]:
        """Queue all or, where one of them raises what `submit` does, none. Where there is room they begin at the same
        boundary, so that a prompt that is the same in several goes through once.
        """
        admission = self._engine.admission
        for request in requests:
            admission.check(request)
        streams = [TokenStream(request, admission.predict(request)) for request in requests]
        with self._changed:
            self._require_places(len(streams))
            for stream in streams:
                self._scheduler.add(
                    Waiting(
                        stream,
                        stream.request.selection,
                        time.perf_counter(),
                        next(self._orders),
                        background=stream.request.priority == "background",
                        session=stream.request.session,
                    )
                )
            self._changed.notify()
        return streams

    def run(self, function: Callable[[Engine], T]) -> Future[T]:
        """Call `function` with the engine, on its thread, when all requests before it are done and before any after it.

        Raises Busy if the queue is full.
        """
        future: Future[T] = Future()
        with self._changed:
            self._require_places(1)
            self._calls.append(_Call(function, future, next(self._orders)))  # type: ignore[arg-type]
            self._changed.notify()
        return future

    def close(self) -> None:
        """Take no more, finish what is queued, end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> EngineWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _require_places(self, count: int) -> None:
        """Raises Busy. Requests that were cancelled in the queue take no place in it."""
        if self._closing:
            raise Busy("The engine is shutting down and takes no more requests. Send it again after the restart.")
        if self.waiting + count > self._queue_size:
            self._drop_cancelled()
        if self.waiting + count > self._queue_size:
            raise Busy(
                f"{self.waiting} requests are waiting already, {count} more would be too many: at most "
                f"{self._queue_size} are queued. Try again shortly."
            )

    def _drop_cancelled(self) -> None:
        """Answer the queued requests that nobody waits for any more, which cost nothing, and refuse those in the
        background whose time is over.
        """
        for waiting in self._scheduler.drop(lambda stream: stream.request.cancelled.is_set()):
            waiting.job.put(_never_begun(waiting, self._engine))
        self._refuse_overdue(time.perf_counter())

    def _refuse_overdue(self, now: float) -> None:
        for waiting in self._scheduler.overdue(now):
            waiting.job.put(Busy(_overdue(time.perf_counter() - waiting.submitted)))

    def _loop(self) -> None:
        while self._wait():
            try:
                with Batch(self._engine, self._pressing) as batch:
                    self._serve(batch)
            except Exception as error:  # whatever it is, those who wait must hear of it and the thread must live on
                for stream in self._running.values():
                    stream.put(error)
            self._running.clear()
            self._call()
            self._rest()

    def _wait(self) -> bool:
        """Until there is something to do; False once closed and drained."""
        with self._changed:
            self._changed.wait_for(lambda: self.waiting or self._closing)
            return bool(self.waiting)

    def _rest(self) -> None:
        """Where all that wait are in the background and their experts are not there, look again in a while.

        Once closed there is no while: nothing will bring their experts any more.
        """
        with self._changed:
            self._drop_cancelled()
            if not len(self._scheduler) or not self._scheduler.only_background or self._calls:
                return
            if self._closing:
                self._refuse_overdue(inf)
            else:
                self._changed.wait(REST_SECONDS)

    def _call(self) -> None:
        """Run the next call, if no request that came before it is left."""
        with self._changed:
            if not self._calls or self._scheduler.has_before(self._calls[0].order):
                return
            call = self._calls.popleft()
        call.run(self._engine)

    def _serve(self, batch: Batch) -> None:
        """Until nothing runs and nothing may be admitted before the next call."""
        while self._admit(batch) or len(batch):
            for event in batch.step():
                self._tell(event)

    def _admit(self, batch: Batch) -> bool:
        """Admit what the scheduler says; whether anything was."""
        admitted = False
        while (waiting := self._next(batch)) is not None:
            number = waiting.order
            self._running[number] = waiting.job  # first, so that whatever happens to it is told
            try:
                submission = Submission(waiting.submitted, waiting.job.predicted)
                batch.admit(number, waiting.job.request, submission)
            except MoepagerError as error:  # its experts could not be paged in; the others go on
                self._running.pop(number).put(error)
                continue
            admitted = True
        return admitted

    def _next(self, batch: Batch) -> Waiting[TokenStream] | None:
        with self._changed:
            self._drop_cancelled()
            if not len(self._scheduler) or batch.full:
                return None
            before = self._calls[0].order if self._calls else None
            return self._scheduler.next(_Room(self._engine, batch), time.perf_counter(), before)

    def _pressing(self, batch: Batch) -> bool:
        """Whether a request waits that could run at once, were it not for a prompt that waits for its experts."""
        with self._changed:
            before = self._calls[0].order if self._calls else None
            return not batch.full and self._scheduler.has_settled(_Room(self._engine, batch), before)

    def _tell(self, event: Event | FailedEvent) -> None:
        stream = self._running[event.row]
        if isinstance(event, FinishedEvent | FailedEvent):
            del self._running[event.row]
        stream.put(event.error if isinstance(event, FailedEvent) else replace(event, row=0))


def _overdue(seconds: float) -> str:
    return (
        f"Background requests cause no swap, and the experts of this one were not in memory for {seconds:.3g} s. Send "
        "it again while its task is served, or without the background priority."
    )


def _never_begun(waiting: Waiting[TokenStream], engine: Engine) -> FinishedEvent:
    request = waiting.job.request
    queued = 1000 * (time.perf_counter() - waiting.submitted)
    experts = engine.card.layers * engine.card.experts if request.selection is None else len(request.selection)
    predicted = waiting.job.predicted
    served = Served(request.mode, 1.0, experts, 0, 0, 0.0, 0.0, engine.bank.resident_bytes, queued, predicted)
    return FinishedEvent(0, "cancelled", "", len(request.prompt), 0, served)
