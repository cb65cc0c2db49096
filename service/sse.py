"""Server-sent events: bytes of frames, and a response that always tells when it has ended. Knows no engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

_json = json.JSONEncoder(ensure_ascii=False).encode  # made once: `dumps` makes one for each frame
DONE = b"data: [DONE]\n\n"
PING = b": waiting\n\n"  # a comment: every client skips it, and a dead connection shows


def comment_frame(text: str) -> bytes:
    return f": {text}\n\n".encode()


def data_frame(body: Mapping[str, object]) -> bytes:
    return f"data: {_json(body)}\n\n".encode()


class DataFrames:
    """Frames of one stream whose bodies all begin with the fields of `shared`, which are written once."""

    def __init__(self, shared: Mapping[str, object]) -> None:
        self._head = f"data: {_json(shared)[:-1]}"

    def frame(self, more: Mapping[str, object]) -> bytes:
        """`data_frame` of both; neither may be empty, nor name a field twice."""
        return f"{self._head}, {_json(more)[1:]}\n\n".encode()


def named_frame(event: str, body: Mapping[str, object]) -> bytes:
    return f"event: {event}\n".encode() + data_frame(body)


class EventStream(StreamingResponse):
    """Streams frames. `on_end` runs exactly once, however it ends: all sent, client gone, error, or task cancelled.

    The frames' generator can't promise that: where the server stops iterating, its `finally` waits for the garbage
    collector.
    """

    def __init__(self, frames: AsyncIterator[bytes], headers: Mapping[str, str], on_end: Callable[[], None]) -> None:
        super().__init__(frames, headers={"cache-control": "no-cache", **headers}, media_type="text/event-stream")
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
