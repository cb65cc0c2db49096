"""`GET /metrics`: for Prometheus. With keys set it needs one, of any role."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from service.context import PartsDep
from service.described import METRICS
from service.metrics import CONTENT_TYPE

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=Response, responses=METRICS)
async def metrics(parts: PartsDep) -> Response:
    return Response(parts.metrics.text(), media_type=CONTENT_TYPE)
