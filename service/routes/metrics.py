"""`GET /metrics`: for Prometheus. With keys set it needs one, of any role, that is not limited to tasks."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.context import PartsDep
from service.described import METRICS
from service.metrics import CONTENT_TYPE
from service.parts import Parts
from store.errors import Forbidden, StoreUnreachable
from store.records import JobTally

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=Response, responses=METRICS)
async def metrics(request: Request, parts: PartsDep) -> Response:
    """What the service counts, for Prometheus; not for a key that is limited to tasks."""
    if parts.tasks is not None:
        raise Forbidden("The metrics count every task, and this key is limited to some. Ask with a key that is not.")
    jobs = await asyncio.to_thread(tally, parts)
    state = request.app.state
    text = parts.metrics.text(jobs, state.draining.paused, len(state.papers.changed))
    return Response(text, media_type=CONTENT_TYPE)


def tally(parts: Parts) -> JobTally | None:
    """None while the store is away: the rest is told all the same."""
    try:
        return parts.store.jobs.tally(parts.catalogue.model)
    except StoreUnreachable:
        return None
