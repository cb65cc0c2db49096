"""What the OpenAPI description says of answers beyond their status: kinds of content, and one shape of error."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


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
