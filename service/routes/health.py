"""`/healthz`: the process lives. `/readyz`: it can answer: the model is loaded, the store there, no end in sight."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.context import Opening, PartsDep
from store.errors import StoreUnreachable

router = APIRouter(tags=["health"])


@router.get("/healthz")
@router.get("/health", include_in_schema=False)  # the name that OpenAI's load generators probe
async def healthz() -> dict[str, str]:
    """The process lives."""
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(request: Request, parts: PartsDep) -> dict[str, str]:
    """It can answer: a 503 while it loads, is drained or stopping, has lost its store or looks at it no more."""
    opening: Opening = request.app.state.opening
    if opening.lost is not None:
        raise opening.lost
    if request.app.state.watch.done():
        raise StoreUnreachable(
            "The service no longer looks at its store: tasks that change and keys that are revoked there go unnoticed. "
            "Restart it, and look in its log for why."
        )
    return {"status": "ready", "model": parts.model_id}
