"""`/v1/drain`: take no new work, so that the service can be stopped once nothing is under way; or take it again."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from service.draining import Draining
from service.guard import operators_only

router = APIRouter(tags=["health"], dependencies=[operators_only])


@router.get("/v1/drain")
async def state(request: Request) -> dict[str, Any]:
    """`under_way` counts the answers that are not finished, those that wait included."""
    draining: Draining = request.app.state.draining
    return {"draining": draining.paused, "under_way": draining.asked}


@router.post("/v1/drain")
async def drain(request: Request) -> dict[str, Any]:
    """From now on every POST and /readyz get a 503, and what is under way is finished, however long it takes. The
    process goes on: stop it when `under_way` is 0, or DELETE this to take work again. A restart forgets it."""
    request.app.state.draining.pause(True)
    return await state(request)


@router.delete("/v1/drain")
async def resume(request: Request) -> dict[str, Any]:
    """Take work again."""
    request.app.state.draining.pause(False)
    return await state(request)
