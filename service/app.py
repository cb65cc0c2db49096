"""The HTTP application: routes, errors and the life of the parts. Which parts they are is the caller's choice."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager

from fastapi import FastAPI

from service.context import opening
from service.middleware import BodyLimit, RequestIds
from service.parts import Parts
from service.refusals import add_refusals
from service.routes import chat, completions, health, models, query, residency, retrieve, tasks


def create_app(
    open_parts: Callable[[], AbstractContextManager[Parts]], on_failure: Callable[[], None] = lambda: None
) -> FastAPI:
    """The application. Its lifespan opens the parts in the background; `on_failure` is called where that fails."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with opening(app, open_parts, on_failure):
            yield

    app = FastAPI(title="moepager", summary="Task-adaptive expert retrieval for MoE language models", lifespan=lifespan)
    add_refusals(app)
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestIds)
    for routes in (health, models, chat, completions, query, residency, retrieve, tasks):
        app.include_router(routes.router)
    return app
