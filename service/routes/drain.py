"""`/v1/drain`: take no new work, so that this process can be stopped once nothing is under way; or take it again."""

from __future__ import annotations

import os
import socket
from typing import Any

from fastapi import APIRouter, Request

from service.draining import Draining
from service.guard import operators_only

router = APIRouter(tags=["health"], dependencies=[operators_only])


@router.get("/v1/drain")
async def state(request: Request) -> dict[str, Any]:
    """Of this process alone. `under_way` counts the answers that are not finished, those that wait included."""
    draining: Draining = request.app.state.draining
    process = {"host": socket.gethostname(), "pid": os.getpid()}
    return {"draining": draining.paused, "under_way": draining.asked, "process": process}


@router.post("/v1/drain")
async def drain(request: Request) -> dict[str, Any]:
    """From now on every POST to this process and its /readyz get a 503, and what is under way is finished, however long
    it takes. The process goes on: stop it when `under_way` is 0, or DELETE this to take work again. A restart forgets
    it, and other processes on the same store are not drained: ask each at its own address, `process` says which one
    answered."""
    request.app.state.draining.pause(True)
    return await state(request)


@router.delete("/v1/drain")
async def resume(request: Request) -> dict[str, Any]:
    """Take work again."""
    request.app.state.draining.pause(False)
    return await state(request)
