"""`GET /v1/tasks`: what each task can be served with, and its evidence."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request

from service.context import PartsDep
from service.guard import operators_only
from service.idempotency import IdempotencyKey, made_by, scoped
from service.jobs import refuse_active
from service.parts import Parts
from service.planning import judgement
from service.price_tags import price_tag
from service.reloading import Reloader
from service.schemas import TaskBody
from service.serving import Candidate, Policy, ProfiledTask, choose_candidate
from service.uploads import FILES, FORM, MOST_FIELDS, task_of
from store.errors import Conflict, InvalidInput, MoepagerError
from store.records import GENERALIST, MadeBy, StoredCorpus, TaskRecord

router = APIRouter(tags=["tasks"])


@router.get("/v1/tasks")
async def list_tasks(parts: PartsDep) -> dict[str, Any]:
    """`without_profile` are those of the store that this model can't serve yet; `has_text`: a job can profile it."""
    stored, texts = await asyncio.to_thread(lambda: (parts.store.tasks.list(), parts.store.corpora.tasks()))
    tasks = sorted(parts.catalogue.tasks.values(), key=lambda task: task.name)
    return {
        "model": parts.model_id,
        "tasks": [{**task_object(task, parts.policy), "has_text": task.name in texts} for task in tasks],
        "without_profile": [
            {"task": task.name, "description": task.description, "has_text": task.name in texts}
            for task in sorted(stored, key=lambda task: task.name)
            if task.name not in parts.catalogue.tasks and (parts.tasks is None or task.name in parts.tasks)
        ],
    }


@router.post("/v1/tasks", status_code=201, dependencies=[operators_only])
async def create_task(body: TaskBody, request: Request, parts: PartsDep, key: IdempotencyKey = None) -> dict[str, Any]:
    """Stores the text. `POST /v1/jobs` then profiles it, and with its profile the task is in service. With an
    Idempotency-Key the same task may be sent again."""
    return await _create(body, request, parts, key)


@router.post("/v1/tasks/upload", status_code=201, dependencies=[operators_only], openapi_extra=FORM)
async def upload_task(request: Request, parts: PartsDep, key: IdempotencyKey = None) -> dict[str, Any]:
    """As `POST /v1/tasks`, with the texts as files of a form: JSON lines, one item a line."""
    async with request.form(max_files=len(FILES), max_fields=MOST_FIELDS) as form:
        body = await task_of(form)
    return await _create(body, request, parts, key)


async def _create(body: TaskBody, request: Request, parts: Parts, key: str | None) -> dict[str, Any]:
    await asyncio.to_thread(store_task, body, parts, made_by(scoped(key, request), body))
    sizes = {"exemplars": len(body.exemplars), "calibration": len(body.calibration), "evaluation": len(body.evaluation)}
    return {"task": body.name, "description": body.description, **sizes}


@router.delete("/v1/tasks/{name:path}", dependencies=[operators_only])
async def delete_task(name: str, request: Request, parts: PartsDep) -> dict[str, Any]:
    """With its text, exemplars, profiles and evidence. Queries under way end as they began."""
    await asyncio.to_thread(remove_task, name, parts)
    reloader: Reloader = request.app.state.reloader
    await reloader.reload()
    return {"task": name, "deleted": True}


def store_task(body: TaskBody, parts: Parts, request: MadeBy | None) -> None:
    """Does nothing where the same `request` has made the task before. Raises Conflict where its key was used for
    another body, and where the name is taken."""
    if body.name == GENERALIST:
        raise InvalidInput(f"The name {GENERALIST!r} stands for all tasks together; choose another.", param="name")
    if done_before(request, parts):
        return
    items = [[item.json_item() for item in split] for split in (body.calibration, body.evaluation)]
    corpus = StoredCorpus(body.name, tuple(body.exemplars), tuple(items[0]), tuple(items[1]))
    task = TaskRecord(body.name, body.description)
    try:
        parts.store.corpora.create(task, corpus, datetime.now(UTC), request=request)
    except Conflict:
        if not done_before(request, parts):  # the same request twice at once
            raise


def done_before(request: MadeBy | None, parts: Parts) -> bool:
    known = None if request is None else parts.store.corpora.made_by(request.key)
    if known is not None and known != request:
        raise Conflict(
            "This Idempotency-Key was used for a task with another body. Send a key of its own with every new request."
        )
    return known is not None


def remove_task(name: str, parts: Parts) -> None:
    refuse_active(parts.store, name)
    parts.store.tasks.delete(name)


@router.post("/v1/tasks/reload", dependencies=[operators_only])
async def reload_tasks(request: Request) -> dict[str, Any]:
    """Read tasks, exemplars and keys from the store now; it also happens by itself within a second of a change."""
    reloader: Reloader = request.app.state.reloader
    return await list_tasks(await reloader.reload())


def task_object(task: ProfiledTask, policy: Policy) -> dict[str, Any]:
    """`serves` is the selection that a request without wishes gets; None where mask mode is refused, for `refusal`."""
    serves, refusal = None, None
    try:
        serves = choose_candidate(task, policy.keep, policy.scorer, policy).stored.id
    except MoepagerError as error:
        refusal = str(error)
    return {
        "task": task.name,
        "description": task.description,
        "profile_id": task.profile_id,
        "serves": serves,
        "refusal": refusal,
        **judgement(task),
        "evidence": [evidence_object(c, task, policy) for c in sorted(task.candidates, key=_by_size)],
    }


def evidence_object(candidate: Candidate, task: ProfiledTask, policy: Policy) -> dict[str, Any]:
    stored, evidence = candidate.stored, candidate.evidence
    return {
        "selection": stored.id,
        "scorer": stored.scorer,
        "stand_in": stored.stand_in,
        "active": stored.active,
        "calls": stored.selection.calls,
        "calls_by": stored.calls_by,
        "token_bytes": policy.plan.token_bytes(stored.selection),
        "keep": stored.keep,
        "experts": len(stored.selection),
        "bytes": policy.plan.bytes_of(stored.selection),
        "fits": policy.plan.fits(stored.selection),
        "items": evidence.items,
        "accuracy": evidence.accuracy,
        **asdict(price_tag(candidate, task.prices)),
        "full_accuracy": evidence.full_accuracy,
        "retention": evidence.retention,
        "nll": evidence.nll,
        "coverage": evidence.coverage,
    }


def _by_size(candidate: Candidate) -> tuple[float, str]:
    return -candidate.stored.keep, candidate.stored.scorer
