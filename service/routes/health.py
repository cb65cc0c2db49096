"""`/healthz`: the process lives. `/readyz`: it can answer: the model is loaded, the store there, no end in sight."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.context import Opening, PartsDep

router = APIRouter(tags=["health"])


@router.get("/healthz")
@router.get("/health", include_in_schema=False)  # the name that OpenAI's load generators probe
async def healthz() -> dict[str, str]:
    """The process lives."""
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(request: Request, parts: PartsDep) -> dict[str, str]:
    """It can answer: a 503 while it loads, is drained or stopping, or has lost its store."""
    opening: Opening = request.app.state.opening
    if opening.lost is not None:
        raise opening.lost
    return {"status": "ready", "model": parts.model_id}
