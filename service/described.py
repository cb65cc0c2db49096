"""What the OpenAPI description says of answers beyond their status: kinds of content, and one shape of error."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel

from service.guard import require_operator


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """Every refusal and failure, in OpenAI's form."""

    error: ErrorDetail


Answers = dict[int | str, dict[str, Any]]

ERRORS: Answers = {
    "4XX": {"model": ErrorAnswer, "description": "Refused: the message says why, and the fix."},
    "5XX": {"model": ErrorAnswer, "description": "Busy, starting, too late, or a failure of the service."},
}
EVENTS: Answers = {
    200: {
        "description": "The answer; with `stream` as server-sent events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}
ONLY_EVENTS: Answers = {200: {"description": "Server-sent events.", "content": {"text/event-stream": {}}}}
METRICS: Answers = {200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}}}


def mark_for_operators(router: APIRouter) -> None:
    """Say in the description which routes a key of role query may not use."""
    for route in router.routes:
        if isinstance(route, APIRoute) and any(d.call is require_operator for d in route.dependant.dependencies):
            route.openapi_extra = {**(route.openapi_extra or {}), "x-operators-only": True}
