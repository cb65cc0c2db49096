"""What holds for every request before its route: an id, and a bound on its body. Plain ASGI: streams stay streams."""

from __future__ import annotations

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.ids import fresh_id

REQUEST_ID = re.compile(r"[!-~]{1,128}")
MOST_BYTES = 8 * 2**20  # of a body: far more text than any context holds


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
                MutableHeaders(scope=message)["x-request-id"] = scope["request_id"]
            await send(message)

        await self._app(scope, receive, send_with_id)


class BodyLimit:
    """Refuses a body above the limit as soon as that is known, without reading the rest of it."""

    def __init__(self, app: ASGIApp, limit: int = MOST_BYTES) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise HTTPException(413, f"A body may have {self._limit} bytes. Shorten the text")
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)
