"""What holds for every request before its route: an id, and bounds on its body. Plain ASGI: streams stay streams."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.ids import fresh_id

REQUEST_ID = re.compile(r"[!-~]{1,128}")
MOST_BYTES = 8 * 2**20  # of a body: far more text than any context holds
BODY_SECONDS = 30.0  # for a body to arrive


def put_headers(message: Message, headers: Sequence[tuple[bytes, bytes]]) -> None:
    """Into the start of an answer, in place of those of the same names, which are lower case. Starlette's own way to do
    so looks through all headers for each, which every answer would wait for."""
    names = {name for name, _ in headers}
    message["headers"] = [one for one in message.get("headers", ()) if one[0] not in names] + list(headers)


class RequestIds:
    """Gives each request an id, its own `x-request-id` where that is printable, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        wanted = Headers(scope=scope).get("x-request-id", "")
        scope["request_id"] = wanted if REQUEST_ID.fullmatch(wanted) else fresh_id()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                put_headers(message, ((b"x-request-id", scope["request_id"].encode()),))
            await send(message)

        await self._app(scope, receive, send_with_id)


class BodyLimit:
    """Refuses a body above the limit as soon as that is known, without reading the rest of it; and one whose end does
    not come: nothing may wait for a client without end."""

    def __init__(self, app: ASGIApp, seconds: float = BODY_SECONDS, limit: int = MOST_BYTES) -> None:
        self._app, self._seconds, self._limit = app, seconds, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read, whole = 0, False
        deadline = asyncio.get_running_loop().time() + self._seconds

        async def bounded() -> Message:
            nonlocal read, whole
            message = await receive() if whole else await self._in_time(receive, deadline)
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > self._limit:
                raise HTTPException(413, f"A body may have {self._limit} bytes. Shorten the text")
            return message

        await self._app(scope, bounded if scope["type"] == "http" else receive, send)

    async def _in_time(self, receive: Receive, deadline: float) -> Message:
        try:
            async with asyncio.timeout_at(deadline):
                return await receive()
        except TimeoutError:
            late = f"The body had not arrived whole after {self._seconds:g} s. Send it faster, or in smaller requests"
            raise HTTPException(408, late, {"connection": "close"}) from None
