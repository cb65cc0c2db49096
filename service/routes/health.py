"""`/healthz`: the process lives. `/readyz`: it can answer."""

from __future__ import annotations

from fastapi import APIRouter

from service.context import PartsDep

router = APIRouter(tags=["health"])


@router.get("/healthz")
@router.get("/health", include_in_schema=False)  # the name that OpenAI's load generators probe
async def healthz() -> dict[str, str]:
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(parts: PartsDep) -> dict[str, str]:
    return {"status": "ready", "model": parts.model_id}
