"""The HTTP application: routes, errors and the life of the parts. Which parts they are is the caller's choice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager

from fastapi import Depends, FastAPI, Request

from service.audit import keep_audit
from service.characters import refuse_half_characters
from service.context import opening
from service.described import ERRORS, mark_for_operators
from service.desk import Desk
from service.draining import Drain, Draining
from service.guard import Guard, SecurityHeaders
from service.job_queue import open_jobs
from service.middleware import BODY_SECONDS, BodyLimit, RequestIds
from service.papers_watch import PapersWatch, watch_papers
from service.parameters import refuse_unknown
from service.parts import Parts
from service.rate_limits import RateLimits
from service.refusals import add_refusals
from service.reloading import Reloader
from service.routes import (
    chat,
    completions,
    console,
    decisions,
    drain,
    health,
    jobs,
    metrics,
    models,
    plan,
    proposals,
    query,
    residency,
    retrieve,
    tasks,
    tokens,
)
from service.tracing import TELEMETRY, flush

ROUTES = (  # a request is compared with one after the other: first those of queries, whose time counts
    chat,
    completions,
    query,
    health,
    metrics,
    models,
    jobs,
    residency,
    drain,
    plan,
    proposals,
    retrieve,
    decisions,
    tasks,
    tokens,
    console,
)


async def refuse_early(request: Request) -> None:
    """What holds on every route. One dependency, and a coroutine: see asking.py and context.py."""
    refuse_unknown(request)
    await refuse_half_characters(request)


def create_app(
    open_parts: Callable[[], AbstractContextManager[Parts]],
    on_failure: Callable[[], None] = lambda: None,
    redis: str | None = None,
    draining: Draining | None = None,
    body_seconds: float = BODY_SECONDS,
) -> FastAPI:
    """The application. Its lifespan opens the parts in the background; `on_failure` is called where that fails.

    With a `redis` URL jobs are announced there for workers, and keys' requests counted there with all services on it;
    without one both are this process's own.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with opening(app, open_parts, on_failure):
            drain = asyncio.create_task(app.state.draining.watch(app.state.opening))
            app.state.reloader = Reloader(app.state.opening)
            app.state.jobs = open_jobs(app.state.opening, redis)
            await app.state.limits.open()
            watch = app.state.watch = asyncio.create_task(app.state.reloader.watch())
            audit = asyncio.create_task(keep_audit(app.state.opening))
            papers = asyncio.create_task(watch_papers(app.state.opening, app.state.papers))
            try:
                yield
            finally:
                watching = [watch, drain, audit, papers]
                for task in watching:
                    task.cancel()
                await asyncio.to_thread(app.state.jobs.close)
                await asyncio.wait(watching)
                await app.state.limits.close()
                await asyncio.to_thread(flush)

    app = FastAPI(
        title="moepager",
        summary="Task-adaptive expert retrieval for MoE language models",
        lifespan=lifespan,
        telemetry=TELEMETRY,
        responses=ERRORS,
        dependencies=[Depends(refuse_early)],
        docs_url=None,  # the framework's pages load their scripts from elsewhere; the console has our own
        redoc_url=None,
    )
    app.state.draining = draining or Draining()
    app.state.papers = PapersWatch()
    app.state.limits = RateLimits(redis)
    app.state.embeddings_desk, app.state.tokens_desk = Desk("embeddings"), Desk("tokens")
    add_refusals(app)
    app.add_middleware(BodyLimit, body_seconds)
    app.add_middleware(Guard, app.state.limits)
    app.add_middleware(Drain, app.state.draining)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestIds)
    for routes in ROUTES:
        mark_for_operators(routes.router)
        app.include_router(routes.router)
    return app
