"""`GET /v1/residency`: what is on the device. `DELETE`: forget what is idle. `prefetch`: page in ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import APIRouter

from engine.engine import Engine
from engine.occupancy import Occupancy
from service.context import PartsDep
from service.guard import operators_only
from service.parts import Parts
from service.prefetch import prefetch
from service.schemas import PrefetchBody
from service.serving import choose_candidate
from store.errors import MoepagerError
from store.records import ExpertKey, StoredSelection

router = APIRouter(tags=["residency"])


@dataclass(frozen=True, slots=True)
class Look:
    occupancy: Occupancy
    figures: Mapping[str, Any]


def look(parts: Parts) -> Look:
    occupancy, snapshot = parts.engine.occupancy(), asdict(parts.engine.residency())
    if parts.tasks is None:
        return Look(occupancy, snapshot)
    own = {key for stored in served(parts).values() for key in stored.selection}
    seen = only_of(own, occupancy)
    there = [sum(slot >= 0 for slot in row) for row in seen.table]
    figures = {
        **dict.fromkeys(snapshot),  # sums since the start are everybody's
        "slots": snapshot["slots"],
        "slot_bytes": snapshot["slot_bytes"],
        "resident": sum(there),
        "leased": len(seen.leased_slots),
        "resident_bytes": sum(there) * snapshot["slot_bytes"],
        "per_layer": there,
    }
    return Look(seen, figures)


def only_of(own: Container[ExpertKey], occupancy: Occupancy) -> Occupancy:
    """As if the bank held no other experts."""
    table = tuple(
        tuple(slot if ExpertKey(layer, expert) in own else -1 for expert, slot in enumerate(row))
        for layer, row in enumerate(occupancy.table)
    )
    slots = {slot for row in table for slot in row if slot >= 0}
    leased, unfilled = (
        tuple(slot for slot in some if slot in slots) for some in (occupancy.leased_slots, occupancy.unfilled_slots)
    )
    return Occupancy(table, leased, unfilled)


def served(parts: Parts) -> dict[str, StoredSelection]:
    """What each task would be served from now."""
    found = {}
    for name, task in parts.catalogue.tasks.items():
        with suppress(MoepagerError):  # a task without evidence, or none that fits, is served from no selection
            found[name] = choose_candidate(task, parts.policy.keep, parts.policy.scorer, parts.policy).stored
    return found


@router.get("/v1/residency")
async def residency(parts: PartsDep, experts: bool = False) -> dict[str, Any]:
    """`experts=true` adds `table[layer][expert]`, the slot or -1, and which slots are leased or still being read. A key
    that is limited to tasks sees the experts of their selections alone, and none of the sums since the start. `reads`
    says how the files are read: direct, buffered (through the page cache) or mixed, `reads_why` what refused."""
    plan, seen, access = parts.engine.plan, look(parts), parts.engine.access
    more = asdict(seen.occupancy) if experts else {}
    return {
        "model": parts.model_id,
        "budget": plan.budget,
        "planned_bytes": plan.total_bytes,
        "slot_bytes": plan.slot_bytes,
        "slots": plan.slots,
        "changes": parts.changes,
        "reads": access.name,
        "reads_why": access.why,
        **seen.figures,
        **more,
    }


@router.get("/v1/residency/selections")
async def selections(parts: PartsDep) -> dict[str, Any]:
    """What each task would be served from now: `experts[layer]` lists expert ids. The same until `changes` moves."""
    found = {
        name: {"selection": stored.id, "keep": stored.keep, "experts": stored.selection.experts}
        for name, stored in sorted(served(parts).items())
    }
    return {"changes": parts.changes, "tasks": found}


@router.post("/v1/residency/prefetch", dependencies=[operators_only])
async def prefetch_task(body: PrefetchBody, parts: PartsDep) -> dict[str, Any]:
    """Page a task's experts in ahead of its next query; answers once they are there. Running requests go on meanwhile
    and keep theirs; where the task's do not fit beside those, it is a 503, for nobody is made to wait for it. What lies
    idle may give way, as it would to a query, and these experts in their turn."""
    return (await prefetch(body.task, body.keep, body.scorer, body.active, parts)).json()


@router.delete("/v1/residency", dependencies=[operators_only])
async def evict(parts: PartsDep) -> dict[str, Any]:
    """So that the next request of every task is served cold. Waits for its turn on the device."""
    evicted = await asyncio.wrap_future(parts.worker.run(Engine.evict))
    return {"evicted": evicted, **(await residency(parts))}
