"""`GET /v1/plan`: what another memory budget would hold of the model that is served. Loads nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import cache
from typing import Annotated, Any

from fastapi import APIRouter, Query

from engine.card import ModelCard
from engine.plan import MemoryPlan, plan_memory
from service.context import PartsDep
from service.disk import DiskSpeed, measure_disk
from service.model import engine_config
from service.parts import Parts
from service.planning import ModelPlan, plan_task
from store.sizes import parse_bytes

router = APIRouter(tags=["plan"])

Memory = Annotated[str | None, Query(max_length=40, description="A size such as 2GiB; without one, the service's own.")]


@router.get("/v1/plan")
async def plan(parts: PartsDep, memory: Memory = None, task: str | None = None) -> dict[str, Any]:
    """Per task: what fits, its quality, and how long it takes to load. `whole_bytes` would hold every expert."""
    budget = None if memory is None else parse_bytes(memory)
    return await asyncio.to_thread(plan_for, parts, budget, task)


def plan_for(parts: Parts, memory: int | None, task: str | None) -> dict[str, Any]:
    """Raises BudgetError where the budget can't serve the model at all, NotFound for an unknown task."""
    found = parts.engine.plan if memory is None else _plan(parts, memory)
    policy = replace(parts.policy, plan=found)
    wanted = parts.catalogue.tasks.values() if task is None else [parts.catalogue.named(task)]
    tasks = tuple(plan_task(each, policy) for each in sorted(wanted, key=lambda each: each.name))
    body = ModelPlan(parts.engine.card, found, disk_of(parts.engine.card), tasks).json()
    return {**body, "model": parts.model_id, "whole_bytes": found.memory_for(1.0)}


def _plan(parts: Parts, memory: int) -> MemoryPlan:
    settings = parts.settings.model_copy(update={"model": str(parts.folder), "memory": memory})
    return plan_memory(parts.engine.card, engine_config(settings))


@cache
def disk_of(card: ModelCard) -> DiskSpeed:
    """Measured once: it takes half a second, and reads of the service itself would wait for it."""
    return measure_disk(card)
