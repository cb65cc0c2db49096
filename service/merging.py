"""The events of several prompts as one stream: as they come, and signs of life where all are silent.

Every token of a stream goes through here, on the thread that shares the interpreter with the engine's: so the loop
sleeps until something has come, and then takes all that has.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from engine.requests import Event, FinishedEvent
from service.running import Running
from service.sse import PING, comment_frame

PING_SECONDS = 15.0  # a silent stream sends a comment this often
GLANCE_SECONDS = 0.5  # between two looks at how far paging has come, before the first token


class Bell:
    """Rung from any thread, heard by one reader in asyncio. Rings before the reader listens again are one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._coming = self._rung = False
        self._listener: asyncio.Future[bool] | None = None

    def ring(self) -> None:
        if self._coming:  # one that the loop has not noticed yet serves for this one as well
            return
        self._coming = True
        try:
            self._loop.call_soon_threadsafe(self._noticed)
        except RuntimeError:  # the loop is closed: nobody listens any more
            return

    async def heard(self, seconds: float) -> bool:
        """Waits for the next ring since the last one that was heard; False after so many seconds without."""
        if not self._rung:
            self._listener = self._loop.create_future()
            timer = self._loop.call_later(seconds, self._resolve, False)
            try:
                await self._listener
            finally:
                timer.cancel()
        rung, self._rung = self._rung, False
        return rung

    def _noticed(self) -> None:
        self._coming, self._rung = False, True
        self._resolve(True)

    def _resolve(self, rung: bool) -> None:
        if self._listener is not None and not self._listener.done():
            self._listener.set_result(rung)


async def merged(running: Sequence[Running]) -> AsyncIterator[tuple[int, Event] | bytes]:
    """Events of several prompts as they come, each with its prompt's place; where all are silent, comments."""
    bell, signs = Bell(), SignsOfLife(running)
    for one in running:
        one.listen(bell.ring)
    left = dict(enumerate(running))
    while left:
        for place, one in list(left.items()):
            for event in one.taken():
                signs.heard()
                if isinstance(event, FinishedEvent):
                    one.ended(event)  # not before what came with it was passed on
                    del left[place]
                yield place, event
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
