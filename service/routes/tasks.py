"""`GET /v1/tasks`: what each task can be served with, and its evidence."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from service.context import PartsDep
from service.serving import Candidate, Policy, ProfiledTask, choose_candidate
from store.errors import MoepagerError

router = APIRouter(tags=["tasks"])


@router.get("/v1/tasks")
async def list_tasks(parts: PartsDep) -> dict[str, Any]:
    tasks = sorted(parts.catalogue.tasks.values(), key=lambda task: task.name)
    return {"model": parts.model_id, "tasks": [task_object(task, parts.policy) for task in tasks]}


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
        "evidence": [evidence_object(c, policy) for c in sorted(task.candidates, key=_by_size)],
    }


def evidence_object(candidate: Candidate, policy: Policy) -> dict[str, Any]:
    stored, evidence = candidate.stored, candidate.evidence
    return {
        "selection": stored.id,
        "scorer": stored.scorer,
        "keep": stored.keep,
        "experts": len(stored.selection),
        "bytes": policy.plan.bytes_of(stored.selection),
        "fits": policy.plan.fits(stored.selection),
        "items": evidence.items,
        "accuracy": evidence.accuracy,
        "full_accuracy": evidence.full_accuracy,
        "retention": evidence.retention,
        "nll": evidence.nll,
        "coverage": evidence.coverage,
    }


def _by_size(candidate: Candidate) -> tuple[float, str]:
    return -candidate.stored.keep, candidate.stored.scorer
