"""`/v1/proposals`: tasks that queries near no task might be; `/v1/events`: what to look at. For operators."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from service.context import PartsDep
from service.guard import operators_only
from service.idempotency import IdempotencyKey, scoped
from service.jobs import job_named, new_job
from service.lookout import Lookout
from service.parts import Parts
from service.proposals import Proposal
from service.routes.jobs import job_object
from service.schemas import AcceptBody
from store.errors import Conflict, InvalidInput, NotFound
from store.records import Event, Job, StoredCorpus, TaskRecord, UnmatchedQuery

router = APIRouter(tags=["proposals"], dependencies=[operators_only])

HELD_OUT = 3  # every so many-th query is evaluation text
SHOWN = 20  # queries of a proposal in a list


@router.get("/v1/proposals")
async def list_proposals(parts: PartsDep) -> dict[str, Any]:
    """What the queries that were near no task have in common. They are kept where MOEPAGER_KEEP_UNMATCHED says so."""
    found = await parts.discovery.grouped()
    kept = await asyncio.to_thread(parts.discovery.kept)
    shown = [proposal_object(proposal) for proposal in found]
    return {"kept": len(kept), "limit": parts.settings.keep_unmatched, "proposals": shown}


@router.post("/v1/proposals/{proposal}/accept", status_code=202)
async def accept_proposal(
    proposal: str, body: AcceptBody, request: Request, parts: PartsDep, key: IdempotencyKey = None
) -> dict[str, Any]:
    """Make it a task, and start its profiling: two thirds of its queries calibrate, one third is evidence, measured
    against the whole model's own answers."""
    job = await asyncio.to_thread(accept, proposal, body, parts, scoped(key, request))
    lookout: Lookout = request.app.state.jobs
    lookout.wake()
    return {"task": job.task, "job": job_object(job)}


@router.delete("/v1/proposals/{proposal}")
async def reject_proposal(proposal: str, parts: PartsDep) -> dict[str, Any]:
    """Forget its queries."""
    found = await asyncio.to_thread(proposal_named, proposal, parts)
    digests = [query.digest for query in found.queries]
    return {"forgotten": await asyncio.to_thread(parts.store.unmatched.delete, digests)}


@router.get("/v1/unmatched")
async def list_unmatched(parts: PartsDep) -> dict[str, Any]:
    """The queries that are kept, as they are kept."""
    kept = await asyncio.to_thread(parts.discovery.kept)
    return {"limit": parts.settings.keep_unmatched, "queries": [query_object(query) for query in kept]}


@router.delete("/v1/unmatched")
async def forget_unmatched(parts: PartsDep) -> dict[str, Any]:
    """Forget all of them."""
    return {"forgotten": await asyncio.to_thread(parts.store.unmatched.delete)}


@router.delete("/v1/unmatched/{digest}")
async def forget_query(digest: str, parts: PartsDep) -> dict[str, Any]:
    """Forget one of them."""
    if not await asyncio.to_thread(parts.store.unmatched.delete, [digest]):
        raise NotFound(f"No query {digest} is kept. GET /v1/unmatched lists those that are.")
    return {"forgotten": 1}


@router.get("/v1/events")
async def list_events(parts: PartsDep, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
    """Drift of tasks, the youngest first."""
    found = await asyncio.to_thread(parts.store.events.list, limit)
    return {"events": [event_object(event) for event in found]}


def proposal_named(name: str, parts: Parts) -> Proposal:
    for proposal in parts.discovery.proposals():
        if proposal.id == name:
            return proposal
    raise NotFound(
        f"There is no proposal {name}: its queries are gone, or it has another id since others joined them. "
        "GET /v1/proposals lists them as they are now."
    )


def accept(name: str, body: AcceptBody, parts: Parts, key: str | None) -> Job:
    """The job of the new task. Task, job and the end of the proposal are one transaction: whoever is killed, a second
    call with the key finds the job, or the proposal as it was. Raises NotFound, and Conflict where the task's name is
    taken, or the key."""
    if (known := accepted_before(name, body, parts, key)) is not None:
        return known
    proposal = proposal_named(name, parts)
    task = body.name or proposal.name
    corpus = corpus_of(task, proposal, body)
    job = new_job(parts.catalogue.model, task, {**body.options(), "proposal": name}, key)
    digests = [query.digest for query in proposal.queries]
    try:
        parts.store.corpora.create(TaskRecord(task, body.description), corpus, job.created, job, digests)
    except Conflict:
        if (known := accepted_before(name, body, parts, key)) is None:
            raise
        return known  # the same call came twice at once
    return job


def accepted_before(name: str, body: AcceptBody, parts: Parts, key: str | None) -> Job | None:
    known = None if key is None else job_named(parts.store, key)
    if known is None:
        return None
    same = dict(known.options) == {**body.options(), "proposal": name} and body.name in (None, known.task)
    if not same:
        raise Conflict(
            f"This Idempotency-Key was used for job {known.id} of task {known.task!r}, of another proposal or with "
            "other options. Send a key of its own with every new request."
        )
    return known


def corpus_of(task: str, proposal: Proposal, body: AcceptBody) -> StoredCorpus:
    texts = [query.text for query in proposal.queries if query.digest not in body.without]
    if not texts:
        raise InvalidInput("`without` leaves no query. Leave it out, or reject the proposal.", param="without")
    held_out: list[Mapping[str, Any]] = [{"prompt": text} for text in texts[HELD_OUT - 1 :: HELD_OUT]]
    rest = [{"prompt": text} for place, text in enumerate(texts) if (place + 1) % HELD_OUT]
    return StoredCorpus(task, tuple(texts), tuple(rest), tuple(held_out))


def proposal_object(proposal: Proposal) -> dict[str, Any]:
    return {
        "id": proposal.id,
        "name": proposal.name,
        "queries": len(proposal.queries),
        "asked": proposal.asked,
        "cohesion": proposal.cohesion,
        "exemplars": [query_object(query) for query in proposal.queries[:SHOWN]],
    }


def query_object(query: UnmatchedQuery) -> dict[str, Any]:
    return {**asdict(query), "updated": query.updated.isoformat()}


def event_object(event: Event) -> dict[str, Any]:
    return {**asdict(event), "created": event.created.isoformat()}
