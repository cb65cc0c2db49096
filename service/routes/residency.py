"""`GET /v1/residency`: what is on the device. `DELETE`: forget what no running request holds."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from engine.engine import Engine
from service.context import PartsDep
from service.guard import operators_only

router = APIRouter(tags=["residency"])


@router.get("/v1/residency")
async def residency(parts: PartsDep) -> dict[str, Any]:
    plan = parts.engine.plan
    return {
        "model": parts.model_id,
        "budget": plan.budget,
        "planned_bytes": plan.total_bytes,
        "slot_bytes": plan.slot_bytes,
        "slots": plan.slots,
        **asdict(parts.engine.residency()),
    }


@router.delete("/v1/residency", dependencies=[operators_only])
async def evict(parts: PartsDep) -> dict[str, Any]:
    """So that the next request of every task is served cold. Waits for its turn on the device."""
    evicted = await asyncio.wrap_future(parts.worker.run(Engine.evict))
    return {"evicted": evicted, **(await residency(parts))}
