"""`/v1/jobs`: start, watch and cancel the profiling of tasks. For operators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.context import PartsDep, RequestId
from service.described import ONLY_EVENTS
from service.draining import Draining
from service.guard import operators_only
from service.idempotency import IdempotencyKey, scoped
from service.jobs import ACTIVE, queue_job
from service.lookout import Lookout
from service.parts import Parts
from service.refusals import with_error_frame
from service.schemas import JobBody
from service.sse import PING, EventStream, named_frame
from store.errors import Conflict
from store.records import Job

router = APIRouter(tags=["jobs"], dependencies=[operators_only])

LOOK_SECONDS = 0.5
PING_LOOKS = 30  # looks without news between two comments


@router.post("/v1/jobs", status_code=202)
async def start_job(body: JobBody, request: Request, parts: PartsDep, key: IdempotencyKey = None) -> dict[str, Any]:
    """Profile a task, or, as the task `generalist`, renew the mean of all. Asked again with the same Idempotency-Key it
    gives the job of the first time."""
    model, options = parts.catalogue.model, body.options()
    job = await asyncio.to_thread(queue_job, parts.store, model, body.task, options, scoped(key, request))
    lookout: Lookout = request.app.state.jobs
    lookout.wake()
    return job_object(job)


@router.get("/v1/jobs")
async def list_jobs(parts: PartsDep) -> dict[str, Any]:
    """All of them, with how far they are."""
    jobs = await asyncio.to_thread(parts.store.jobs.list)
    return {"jobs": [job_object(job) for job in jobs]}


@router.get("/v1/jobs/{job}")
async def get_job(job: str, parts: PartsDep) -> dict[str, Any]:
    """One of them."""
    return job_object(await asyncio.to_thread(parts.store.jobs.get, job))


@router.get("/v1/jobs/{job}/events", response_class=Response, responses=ONLY_EVENTS)
async def job_events(job: str, name: RequestId, request: Request, parts: PartsDep) -> Response:
    """The job whenever it changes, as server-sent events, until it has ended."""
    first = await asyncio.to_thread(parts.store.jobs.get, job)
    frames = with_error_frame(name, job_frames(first, parts, request.app.state.draining), partial(named_frame, "error"))
    return EventStream(frames, {}, lambda: None)


@router.delete("/v1/jobs/{job}")
async def cancel_job(job: str, parts: PartsDep) -> dict[str, Any]:
    """Its process ends within about a second."""
    return job_object(await asyncio.to_thread(cancel, job, parts))


def cancel(name: str, parts: Parts) -> Job:
    """Its process ends within about a second. Raises Conflict where the job has ended."""
    job = parts.store.jobs.get(name)
    if not parts.store.jobs.change(name, ACTIVE, state="cancelled", detail="cancelled by request"):
        raise Conflict(
            f"Job {name} is {parts.store.jobs.get(name).state} already; only a job that has not ended can be."
        )
    return parts.store.jobs.get(job.id)


async def job_frames(job: Job, parts: Parts, draining: Draining) -> AsyncIterator[bytes]:
    yield named_frame("job", job_object(job))
    quiet = 0
    while job.state in ACTIVE:
        await asyncio.sleep(LOOK_SECONDS)
        draining.refuse()
        now = await asyncio.to_thread(parts.store.jobs.get, job.id)
        if (now.state, now.progress, now.detail) != (job.state, job.progress, job.detail):
            yield named_frame("job", job_object(now))
            quiet = 0
        elif (quiet := quiet + 1) % PING_LOOKS == 0:
            yield PING
        job = now


def job_object(job: Job) -> dict[str, Any]:
    return {**asdict(job), "created": job.created.isoformat(), "updated": job.updated.isoformat()}
