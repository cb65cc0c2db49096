"""`GET /metrics`: for Prometheus. With keys set it needs one, of any role, that is not limited to tasks."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from service.context import PartsDep
from service.described import METRICS
from service.metrics import CONTENT_TYPE
from store.errors import Forbidden

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=Response, responses=METRICS)
async def metrics(parts: PartsDep) -> Response:
    """What the service counts, for Prometheus; not for a key that is limited to tasks."""
    if parts.tasks is not None:
        raise Forbidden("The metrics count every task, and this key is limited to some. Ask with a key that is not.")
    return Response(parts.metrics.text(), media_type=CONTENT_TYPE)
