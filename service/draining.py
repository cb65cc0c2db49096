"""The end of a service that was told to stop: no new work, time for answers under way, then a last word to the rest.

The port stays open meanwhile, so that probes and clients are told rather than left guessing. An operator may drain it
beforehand: then it takes no new work until it is told otherwise, and what is under way has all the time it needs.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from service.context import Opening
from service.refusals import READY, refusal
from store.errors import Busy

log = logging.getLogger("moepager.service")

STOPPING = "The service is stopping and takes no new requests. Send it again shortly, or to another one."
CUT_OFF = "The answer was not finished before the service stopped. Send the request again."
DRAINED = "The service is drained: its operator lets it take no new work. Send it again later, or to another one."
ALIVE = frozenset({"/healthz", "/health"})
DRAIN = "/v1/drain"
LOOK_SECONDS = 0.05
LAST_WORDS_SECONDS = 2.0  # for errors to reach those who were cut off


class Draining:
    """`begin` once the service is told to stop; `ended` is called when nobody waits any more, or the grace is over."""

    def __init__(self, grace: float = 0.0, ended: Callable[[], None] = lambda: None) -> None:
        self._grace, self._ended = grace, ended
        self.begun = False
        self.paused = False  # by an operator
        self.active = 0  # requests that are being answered
        self.asked = 0  # of them, those that are work: the POSTs

    def begin(self) -> None:
        """May be called in a signal's handler."""
        self.begun = True

    def pause(self, paused: bool) -> None:
        if paused != self.paused:
            log.info("drained by an operator" if paused else "takes work again")
        self.paused = paused

    def takes(self, scope: Scope) -> bool:
        """Whether the request is let in while an operator has drained the service: whoever looks still may."""
        return not self.paused or (scope["path"] != READY and not is_work(scope))

    def refuse(self) -> None:
        """Raises Busy once the service is stopping."""
        if self.begun:
            raise Busy(STOPPING)

    async def watch(self, opening: Opening) -> None:
        """Ends by being cancelled, or after `ended`."""
        while not self.begun:
            await asyncio.sleep(LOOK_SECONDS)
        log.info("stopping: %d requests are under way and have %g s", self.active, self._grace)
        await self._quiet(self._grace)
        if self.active:
            log.warning("%d requests are cut off", self.active)
            cut_off(opening)
            await self._quiet(LAST_WORDS_SECONDS)
        self._ended()

    async def _quiet(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.active and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_SECONDS)


def cut_off(opening: Opening) -> None:
    """Every answer under way ends with an error that its client sees, in the middle of a stream too."""
    for stream in list(opening.current().streams) if opening.ready else ():
        stream.put(Busy(CUT_OFF))  # at once: the engine ends it at its next token, which may take long
        stream.cancel()


def is_work(scope: Scope) -> bool:
    return bool(scope["method"] == "POST" and scope["path"] != DRAIN)


class Server(uvicorn.Server):
    """Drains at the first signal; a second one ends the process where it stands, which loses nothing but answers."""

    def __init__(self, config: uvicorn.Config, draining: Draining) -> None:
        super().__init__(config)
        self._draining = draining
        self.told: int | None = None  # the signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the parent's form
        if self.told is not None:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.told = sig
        self._draining.begin()


class Drain:
    """Counts requests, and refuses new ones once the service is stopping. Plain ASGI."""

    def __init__(self, app: ASGIApp, draining: Draining) -> None:
        self._app, self._draining = app, draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ALIVE:
            await self._app(scope, receive, send)
            return
        if self._draining.begun:
            answer = refusal(Busy(STOPPING))
            answer.headers["connection"] = "close"
            await answer(scope, receive, send)
            return
        if not self._draining.takes(scope):
            await refusal(Busy(DRAINED))(scope, receive, send)
            return
        work = is_work(scope)
        self._draining.active += 1
        self._draining.asked += work
        try:
            await self._app(scope, receive, send)
        finally:
            self._draining.active -= 1
            self._draining.asked -= work
