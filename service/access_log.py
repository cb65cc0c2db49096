"""Logs: everything that is said on standard error is one line of JSON, and so is every query, whatever its end."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from engine.requests import FinishedEvent
from service.answer import Prepared

COSTS = (
    "task",
    "similarity",
    "reason",
    "mode",
    "keep",
    "experts",
    "experts_paged",
    "bytes_paged",
    "swap_ms",
    "queue_ms",
    "ttft_ms",
    "coverage",
    "escalated_at",
    "prompt_tokens",
    "tokens",
)

access = logging.getLogger("moepager.access")


class JsonLines(logging.Formatter):
    """`time level logger message` and, where there is one, `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


def write_lines() -> None:
    """To standard error. A query's line is written as it is: it has its own fields."""
    for logger, form in ((logging.getLogger(), JsonLines()), (access, logging.Formatter("%(message)s"))):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(form)
        logger.handlers[:] = [handler]
        logger.setLevel(logging.INFO)
    access.propagate = False


def log_query(prepared: Prepared, outcome: str, finished: FinishedEvent | None, seconds: float) -> None:
    _write(line_of(prepared, outcome, finished, seconds))


def log_refused(name: str, key: str, outcome: str, code: str, seconds: float) -> None:
    """A query that was refused before it ran: no task was decided, or none counts. `code` is its answer's."""
    nothing = dict.fromkeys(COSTS)
    _write({**_begun(name, key, outcome, seconds), "code": code, **nothing})


def _write(line: dict[str, Any]) -> None:
    access.info(json.dumps(line, ensure_ascii=False))


def _begun(name: str, key: str, outcome: str, seconds: float) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "query_id": name,
        "key": key or None,
        "outcome": outcome,
        "duration_ms": 1000 * seconds,
    }


def line_of(prepared: Prepared, outcome: str, finished: FinishedEvent | None, seconds: float) -> dict[str, Any]:
    """Costs are null where the query ended before the engine said what it cost. `key` is the id of an API key."""
    retrieval, served = prepared.serving.retrieval, finished.served if finished else None
    return {
        **_begun(prepared.question.id, prepared.question.caller.owner, outcome, seconds),
        "code": None,
        "task": retrieval.task,
        "similarity": retrieval.similarity,
        "reason": retrieval.reason,
        "mode": served.mode if served else prepared.serving.mode,
        "keep": prepared.serving.keep,
        "experts": served.experts if served else None,
        "experts_paged": served.experts_paged if served else None,
        "bytes_paged": served.bytes_paged if served else None,
        "swap_ms": served.swap_ms if served else None,
        "queue_ms": served.queue_ms if served else None,
        "ttft_ms": served.ttft_ms if served else None,
        "coverage": served.coverage if served else None,
        "escalated_at": served.escalated.at_token if served and served.escalated else None,
        "prompt_tokens": len(prepared.request.prompt),
        "tokens": finished.completion_tokens if finished else None,
    }
