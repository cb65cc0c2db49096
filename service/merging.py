"""The events of several prompts as one stream: as they come, and signs of life where all are silent.

Every token of a stream goes through here, on the thread that shares the interpreter with the engine's, and each time
that it is woken the engine waits. So the loop sleeps until something has come, takes all that has, and sleeps for
`GATHER_SECONDS` at least before it does so again: the first token is sent at once, and the end, and what comes faster
than anybody reads goes out together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from engine.requests import Event, FinishedEvent
from service.running import Running
from service.sse import PING, comment_frame

PING_SECONDS = 15.0  # a silent stream sends a comment this often
GATHER_SECONDS = 0.01  # that a further token may wait for the next ones; models that take longer for one never do
GLANCE_SECONDS = 0.5  # between two looks at how far paging has come, before the first token


class Bell:
    """Rung from any thread, heard by one reader in asyncio. Rings before the reader listens again are one.

    For `gather` seconds after a ring was heard only an urgent one wakes the reader, and others cost their thread
    nothing.
    """

    def __init__(self, gather: float = 0.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._gather, self._open_at = gather, 0.0
        self._coming = self._rung = self._urgent = self._muffled = False
        self._listener: asyncio.Future[None] | None = None

    def ring(self, urgent: bool = True) -> None:
        # In this order, and the reader's is the other way round: either it finds `_rung`, or it is found listening.
        self._rung, self._urgent = True, self._urgent or urgent
        if self._coming or (self._muffled and not urgent):  # one that is on its way serves for this one as well
            return
        self._coming = True
        try:
            self._loop.call_soon_threadsafe(self._noticed)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return

    async def heard(self, seconds: float) -> bool:
        """Waits for the next ring since the last one that was heard; False after so many seconds without."""
        if self._muffled:
            await self._sleep(self._open_at - self._loop.time())
            self._muffled = False
        if not self._rung:
            await self._sleep(seconds)
        rung, self._rung, self._urgent = self._rung, False, False
        if rung and self._gather:
            self._muffled, self._open_at = True, self._loop.time() + self._gather
        return rung

    async def _sleep(self, seconds: float) -> None:
        """Until a ring is noticed, or so long."""
        self._listener = self._loop.create_future()
        timer = self._loop.call_later(seconds, self._wake)
        try:
            await self._listener
        finally:
            timer.cancel()

    def _noticed(self) -> None:
        self._coming, self._rung = False, True
        if self._urgent or not self._muffled:
            self._wake()

    def _wake(self) -> None:
        if self._listener is not None and not self._listener.done():
            self._listener.set_result(None)


async def merged(running: Sequence[Running]) -> AsyncIterator[tuple[int, Sequence[Event]] | bytes]:
    """Events of several prompts as they come, at each look all of a prompt with its place; where all are silent,
    comments."""
    bell, signs = Bell(GATHER_SECONDS), SignsOfLife(running)
    for one in running:
        one.listen(bell.ring)
    left = dict(enumerate(running))
    while left:
        for place, one in list(left.items()):
            if not (events := one.taken()):
                continue
            signs.heard()
            last = events[-1]
            if isinstance(last, FinishedEvent):
                if last.reason == "cancelled" and events[:-1]:  # an error is told in its place: first what came before
                    yield place, events[:-1]
                one.ended(last)
                del left[place]
            yield place, events
        if left and not await bell.heard(min(signs.glance, *(one.seconds_left for one in left.values()))):
            comment = signs.look()
            if comment is not None:
                yield comment


class SignsOfLife:
    """Comments for a silent stream: how far the paging of experts has come while that changes, else one now and then.

    Looks cost the others time: seldom where nothing is missing, and ever less often where it takes long.
    """

    def __init__(self, running: Sequence[Running]) -> None:
        self._running = running
        self._told, self._heard = PING, time.monotonic()
        self.glance = min(GLANCE_SECONDS, PING_SECONDS)  # seconds until the next look

    def heard(self) -> None:
        self._heard = time.monotonic()

    def look(self) -> bytes | None:
        comment = _waiting(self._running)
        self.glance = min(PING_SECONDS, PING_SECONDS if comment == PING else 1.5 * self.glance)
        if comment == self._told and time.monotonic() - self._heard < PING_SECONDS:
            return None
        self._told, self._heard = comment, time.monotonic()
        return comment


def _waiting(running: Sequence[Running]) -> bytes:
    found = next((progress for one in running if (progress := one.progress()) is not None), None)
    return PING if found is None else comment_frame(f"waiting: {found[0]} of {found[1]} experts are in memory")
