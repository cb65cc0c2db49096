"""`POST /v1/retrieve`: which task a query belongs to, without generating."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from service.answer import decision
from service.asking import AskerDep
from service.callers import Caller
from service.parts import Parts
from service.retrieval import Retrieval
from service.schemas import RetrieveBody

router = APIRouter(tags=["query"])


@router.post("/v1/retrieve")
async def retrieve(body: RetrieveBody, asker: AskerDep) -> dict[str, Any]:
    """Which task a query belongs to: null where none is near enough. Nothing is generated."""
    found = await asyncio.to_thread(retrieve_and_store, body.query, *asker)
    return {
        "id": asker.name,
        "task": found.task,
        "nearest": found.nearest,
        "similarity": found.similarity,
        "threshold": found.threshold,
        "reason": found.reason,
        "ranked": [asdict(one) for one in found.ranked],
    }


def retrieve_and_store(query: str, name: str, caller: Caller, parts: Parts) -> Retrieval:
    """The decision is stored as a request in mask mode would store it."""
    found = parts.retriever.decide(query)
    parts.store.decisions.add(decision(name, query, found, "mask", parts, caller, None))
    return found
