"""`GET /v1/decisions`: the audit of retrieval, page by page. For operators."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import AwareDatetime

from service.context import PartsDep
from service.guard import operators_only
from store.errors import InvalidInput
from store.records import Decision

router = APIRouter(tags=["query"], dependencies=[operators_only])

LARGEST_ID = 2**31 - 1


@router.get("/v1/decisions")
async def list_decisions(
    parts: PartsDep,
    task: str | None = None,
    since: Annotated[
        AwareDatetime | None, Query(description="A time with its zone, such as 2026-01-31T12:00:00Z.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(ge=1, le=LARGEST_ID, description="`next` of the page before.")] = None,
) -> dict[str, Any]:
    """How each query got its task, the youngest first: of one `task`, `since` a time. `next` is null on the last page.
    Queries themselves are not kept, only their sha256."""
    since = None if since is None else _in_utc(since)
    found = await asyncio.to_thread(parts.store.decisions.list, limit + 1, task=task, since=since, before=before)
    page = found[:limit]
    return {
        "decisions": [decision_object(one) for one in page],
        "next": page[-1].id if len(found) > limit else None,
        "days_kept": parts.settings.audit_days,
    }


def decision_object(decision: Decision) -> dict[str, Any]:
    return {**asdict(decision), "created": decision.created.isoformat()}


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise InvalidInput(
            f"`since` is outside of all calendars in UTC: {moment.isoformat()}.", param="since"
        ) from None
