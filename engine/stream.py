"""The events of one request, handed from the device's thread to one reader in a plain thread or in asyncio.

Whoever waits for a token takes the interpreter from the thread that makes the next one. So a reader may ask for the end
alone (`end` in a plain thread, `last` in asyncio), or be rung and take all that has come (`listen`, `taken`).
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType

from engine.requests import Event, FinishedEvent, GenerationRequest, SwapCost, TokenEvent


class TokenStream:
    """The events of one request, its row always 0. Iterate it, or iterate it with `async for`; close it to cancel.

    The last event is a FinishedEvent; an error of the engine is raised in its place. Leaving a `with` block closes it.
    """

    def __init__(self, request: GenerationRequest, predicted: SwapCost | None = None) -> None:
        """`predicted` is what the request would wait for as things stood when it was submitted."""
        self.request = request
        self.predicted = predicted
        self._items: deque[Event | BaseException] = deque()
        self._ready = threading.Condition()
        self._wake: Callable[[], None] | None = None
        self._ring: Callable[[bool], None] | None = None
        self._only_last = False
        self._done = False

    def cancel(self) -> None:
        """The request ends at the next token, with a FinishedEvent of reason "cancelled"."""
        self.request.cancelled.set()

    close = cancel

    def put(self, item: Event | BaseException) -> None:
        """The worker's end."""
        with self._ready:
            if self._only_last and isinstance(item, TokenEvent):
                return
            self._items.append(item)
            self._ready.notify()
            wake, self._wake = self._wake, None
        if wake is not None:
            wake()
        elif self._ring is not None:
            self._ring(not isinstance(item, TokenEvent))

    def listen(self, ring: Callable[[bool], None]) -> None:
        """`ring` is called, from the worker's thread, whenever something has come, with whether it is the end; `taken`
        then gives it."""
        with self._ready:
            self._ring = ring
            waiting = bool(self._items)
        if waiting:
            ring(True)

    def taken(self) -> list[Event]:
        """What has come since the last look, maybe nothing. An error is raised once what came before it is taken."""
        with self._ready:
            if self._items and isinstance(self._items[0], BaseException):
                return [self._passed_on(self._items.popleft())]
            found: list[Event] = []
            while self._items and not isinstance(self._items[0], BaseException):
                found.append(self._passed_on(self._items.popleft()))
            return found

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

    def end(self) -> FinishedEvent:
        """The end alone, in a plain thread: tokens wake nobody."""
        with self._ready:
            self._only_last = True
        for event in self:
            if isinstance(event, FinishedEvent):
                return event
        raise AssertionError("a token stream ends with a FinishedEvent")

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        return self._passed_on(await self._arrival())

    async def last(self) -> FinishedEvent:
        """The end alone: tokens wake nobody."""
        with self._ready:
            self._only_last = True
        async for event in self:
            if isinstance(event, FinishedEvent):
                return event
        raise AssertionError("a token stream ends with a FinishedEvent")

    async def _arrival(self) -> Event | BaseException:
        loop = asyncio.get_running_loop()
        while True:
            arrived: asyncio.Future[None] = loop.create_future()
            with self._ready:
                if self._items:
                    return self._items.popleft()
                self._wake = partial(_set, loop, arrived)
            await arrived

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
