"""What a route is handed: the parts, once they are open, and the id of its request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Request

from service.parts import Parts
from store.errors import Busy, MoepagerError, StoreUnreachable

log = logging.getLogger("moepager.service")


class Opening:
    """The parts of a service while they open, when they are open, and why they could not be opened."""

    def __init__(self) -> None:
        self._parts: Parts | None = None
        self.failure: BaseException | None = None
        self.lost: StoreUnreachable | None = None  # why the last look at the store found none

    @property
    def ready(self) -> bool:
        return self._parts is not None

    @property
    def interval(self) -> float:
        """Seconds between two looks at the store."""
        return self._parts.settings.reload_seconds if self._parts else 1.0

    def opened(self, parts: Parts) -> None:
        self._parts = parts

    def current(self) -> Parts:
        if self._parts is not None:
            return self._parts
        if isinstance(self.failure, MoepagerError):
            raise self.failure
        raise Busy("The model is still loading. Try again shortly; /readyz says when it is ready.")


@asynccontextmanager
async def opening(
    app: FastAPI, open_parts: Callable[[], AbstractContextManager[Parts]], on_failure: Callable[[], None]
) -> AsyncIterator[None]:
    """Open the parts in a thread while the service already answers /healthz; close them when it stops."""
    state = app.state.opening = Opening()
    with ExitStack() as stack:
        task = asyncio.create_task(_open(state, stack, open_parts, on_failure))
        try:
            yield
        finally:
            await task  # a load can't be broken off half-way: wait, then close what it opened
            await asyncio.to_thread(stack.close)


async def _open(
    state: Opening,
    stack: ExitStack,
    open_parts: Callable[[], AbstractContextManager[Parts]],
    on_failure: Callable[[], None],
) -> None:
    try:
        state.opened(await asyncio.to_thread(lambda: stack.enter_context(open_parts())))
    except Exception as error:  # whatever it is, the command that serves has to stop and say it
        log.error("the service could not open its parts: %s", error)
        state.failure = error
        on_failure()


# Coroutines, though they wait for nothing: the framework runs each plain function in a thread, which takes a tenth of a
# millisecond or more, and every request has several of these.
async def current_parts(request: Request) -> Parts:
    return parts_of(request)


async def current_id(request: Request) -> str:
    return request_id(request)


def parts_of(request: Request) -> Parts:
    """As the key of the request sees them."""
    state: Opening = request.app.state.opening
    return state.current().seen_by(request.scope.get("api_key"))


def request_id(request: Request) -> str:
    value: str = request.scope["request_id"]
    return value


PartsDep = Annotated[Parts, Depends(current_parts)]
RequestId = Annotated[str, Depends(current_id)]
