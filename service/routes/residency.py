"""`GET /v1/residency`: what is on the device. `DELETE`: forget what no running request holds."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from engine.engine import Engine
from service.context import PartsDep
from service.guard import operators_only
from service.serving import choose_candidate
from store.errors import MoepagerError

router = APIRouter(tags=["residency"])


@router.get("/v1/residency")
async def residency(parts: PartsDep, experts: bool = False) -> dict[str, Any]:
    """`experts=true` adds `table[layer][expert]`, the slot or -1, and which slots are leased or still being read."""
    plan = parts.engine.plan
    more = asdict(parts.engine.occupancy()) if experts else {}
    return {
        "model": parts.model_id,
        "budget": plan.budget,
        "planned_bytes": plan.total_bytes,
        "slot_bytes": plan.slot_bytes,
        "slots": plan.slots,
        "changes": parts.changes,
        **asdict(parts.engine.residency()),
        **more,
    }


@router.get("/v1/residency/selections")
async def selections(parts: PartsDep) -> dict[str, Any]:
    """What each task would be served from now: `experts[layer]` lists expert ids. The same until `changes` moves."""
    found = {}
    for name, task in sorted(parts.catalogue.tasks.items()):
        with suppress(MoepagerError):  # a task without evidence, or none that fits, is served from no selection
            stored = choose_candidate(task, parts.policy.keep, parts.policy.scorer, parts.policy).stored
            found[name] = {"selection": stored.id, "keep": stored.keep, "experts": stored.selection.experts}
    return {"changes": parts.changes, "tasks": found}


@router.delete("/v1/residency", dependencies=[operators_only])
async def evict(parts: PartsDep) -> dict[str, Any]:
    """So that the next request of every task is served cold. Waits for its turn on the device."""
    evicted = await asyncio.wrap_future(parts.worker.run(Engine.evict))
    return {"evicted": evicted, **(await residency(parts))}
