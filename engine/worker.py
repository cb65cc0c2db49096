"""One thread owns the device; everybody else waits on a stream. Forms batches of waiting requests that fit together.

Knows when to generate and for whom, not how. Streams are read from plain threads or from asyncio, one reader each.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Generic, TypeVar

from engine.engine import Engine
from engine.requests import Event, FinishedEvent, GenerationRequest
from store.errors import Busy

T = TypeVar("T")


class TokenStream:
    """The events of one request, its row always 0. Iterate it, or iterate it with `async for`; close it to cancel.

    The last event is a FinishedEvent; an error of the engine is raised in its place. Leaving a `with` block closes it.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self._items: deque[Event | BaseException] = deque()
        self._ready = threading.Condition()
        self._wake: Callable[[], None] | None = None
        self._done = False

    def cancel(self) -> None:
        """The request ends at the next token, with a FinishedEvent of reason "cancelled"."""
        self.request.cancelled.set()

    close = cancel

    def put(self, item: Event | BaseException) -> None:
        """The worker's end."""
        with self._ready:
            self._items.append(item)
            self._ready.notify()
            wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> TokenStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._done:
            raise StopIteration
        with self._ready:
            self._ready.wait_for(lambda: self._items)
            item = self._items.popleft()
        return self._passed_on(item)

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        loop = asyncio.get_running_loop()
        while True:
            arrived: asyncio.Future[None] = loop.create_future()
            with self._ready:
                if self._items:
                    item = self._items.popleft()
                    break
                self._wake = partial(_set, loop, arrived)
            await arrived
        return self._passed_on(item)

    def _passed_on(self, item: Event | BaseException) -> Event:
        if isinstance(item, BaseException):
            self._done = True
            raise item
        self._done = isinstance(item, FinishedEvent)
        return item


def _set(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    """From the worker's thread. A loop that has ended, or a reader that has gone, is no concern of the worker."""

    def resolve() -> None:
        if not future.done():
            future.set_result(None)

    try:
        loop.call_soon_threadsafe(resolve)
    except RuntimeError:  # the loop is closed
        return


@dataclass(frozen=True, slots=True)
class _Call(Generic[T]):
    """Something else to do on the device's thread."""

    function: Callable[[Engine], T]
    future: Future[T]

    def run(self, engine: Engine) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function(engine))
        except BaseException as error:
            self.future.set_exception(error)


class EngineWorker:
    """Owns the thread, not the engine: whoever opened the engine closes it, after the worker."""

    def __init__(self, engine: Engine, queue_size: int = 64) -> None:
        self._engine = engine
        self._queue_size = queue_size
        self._waiting: deque[TokenStream | _Call[object]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._running = 0
        self._thread = threading.Thread(target=self._loop, name="moepager-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests and calls that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests of the batch that is being generated."""
        return self._running

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Queue a request.

        Raises at once: InvalidInput or BudgetError if it can't ever be served, Busy if the queue is full.
        """
        self._engine.check(request)
        stream = TokenStream(request)
        self._enqueue(stream)
        return stream

    def run(self, function: Callable[[Engine], T]) -> Future[T]:
        """Call `function` with the engine, on its thread, between two batches. Raises Busy if the queue is full."""
        call = _Call(function, Future())
        self._enqueue(call)
        return call.future

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

    def _enqueue(self, job: TokenStream | _Call[T]) -> None:
        with self._changed:
            if self._closing:
                raise Busy("The engine is shutting down and takes no more requests. Send it again after the restart.")
            if len(self._waiting) >= self._queue_size:
                raise Busy(
                    f"{self._queue_size} requests are waiting already, the most that are queued. Try again shortly."
                )
            self._waiting.append(job)  # type: ignore[arg-type]
            self._changed.notify()

    def _loop(self) -> None:
        while (jobs := self._take()) is not None:
            match jobs:
                case _Call():
                    jobs.run(self._engine)
                case _:
                    self._generate(jobs)

    def _take(self) -> list[TokenStream] | _Call[object] | None:
        """The next call, or the next request with all others that fit beside it; None once closed and drained."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return None
            first = self._waiting.popleft()
            if isinstance(first, _Call):
                return first
            batch = [first]
            for job in list(self._waiting):
                if isinstance(job, _Call):
                    break  # calls keep their place: nothing overtakes them
                if self._engine.fit_together([stream.request for stream in (*batch, job)]):
                    batch.append(job)
                    self._waiting.remove(job)
            return batch

    def _generate(self, streams: list[TokenStream]) -> None:
        self._running = len(streams)
        finished: set[int] = set()
        try:
            with closing(self._engine.generate([stream.request for stream in streams])) as events:
                for event in events:
                    streams[event.row].put(_as_row_zero(event))
                    if isinstance(event, FinishedEvent):
                        finished.add(event.row)
                        self._running -= 1
        except Exception as error:  # whatever it is, those who wait must hear of it and the thread must live on
            for row, stream in enumerate(streams):
                if row not in finished:
                    stream.put(error)
        finally:
            self._running = 0


def _as_row_zero(event: Event) -> Event:
    return replace(event, row=0)
