"""Connections within limits: how many there may be, and how long each may take to ask and to read.

uvicorn's own bounds are that an idle connection is closed after an answer; a client that asks half a question, or does
not read its answer, it waits for without end.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.draining import ALIVE
from service.refusals import refusal
from store.errors import Busy

log = logging.getLogger("moepager.service")

ASK_SECONDS = 20.0  # from the connection, or the last answer's end, to a request's whole head
READ_SECONDS = 60.0  # for some tens of kilobytes of an answer to be taken by the client
SPARE = 64  # connections above the limit that are told so; of more than these nothing is read


class Connection(HttpToolsProtocol):
    """One connection. Above `most` only probes are answered, the rest with a 503."""

    most = 512

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._asking: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the parent has it
        super().connection_made(transport)
        above = len(self.connections) - self.most
        if above > SPARE:
            transport.abort()
            return
        if above > 0:
            log.warning("%d connections are open, %d more than may be: refused", self.most + above, above)
            self.app = _probes_only(self.app, self.most)
        self._wait_for_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:  # half a head, or a body that nobody reads
            self._wait_for_request()
        else:
            self._asked()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._has_read()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()  # closes, once all is written
        self._wait_for_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._asked()
        self._has_read()
        super().connection_lost(exc)

    def _wait_for_request(self) -> None:
        """Not anew with each byte that comes."""
        if self._asking is None and not self.transport.is_closing():
            self._asking = self.loop.call_later(ASK_SECONDS, self.transport.close)

    def _asked(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def _wait_for_reader(self) -> None:
        """To abort is the end of a write that waits, and so of its request; to close would wait for the client."""
        if self._reading is None:
            self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def _has_read(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None


def connections_of(most: int) -> type[Connection]:
    return type("Connection", (Connection,), {"most": most})


def _probes_only(app: ASGIApp, most: int) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in ALIVE:
            await app(scope, receive, send)
            return
        full = refusal(
            Busy(f"{most} connections are open, and no more may be (MOEPAGER_CONNECTIONS). Try again shortly.")
        )
        full.headers["connection"] = "close"
        await full(scope, receive, send)

    return answer
