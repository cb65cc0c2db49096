"""The access log: one line of JSON a query, whatever its end, on a logger of its own."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from engine.requests import FinishedEvent
from service.answer import Prepared

access = logging.getLogger("moepager.access")


def write_lines() -> None:
    """Bare lines on standard error, among which nothing else is JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.handlers[:] = [handler]
    access.setLevel(logging.INFO)
    access.propagate = False


def log_query(prepared: Prepared, outcome: str, finished: FinishedEvent | None) -> None:
    access.info(json.dumps(line_of(prepared, outcome, finished), ensure_ascii=False))


def line_of(prepared: Prepared, outcome: str, finished: FinishedEvent | None) -> dict[str, Any]:
    """Costs are null where the query ended before the engine said what it cost."""
    retrieval, served = prepared.serving.retrieval, finished.served if finished else None
    return {
        "query_id": prepared.question.id,
        "task": retrieval.task,
        "similarity": retrieval.similarity,
        "reason": retrieval.reason,
        "mode": served.mode if served else prepared.serving.mode,
        "keep": prepared.serving.keep,
        "experts": served.experts if served else None,
        "experts_paged": served.experts_paged if served else None,
        "bytes_paged": served.bytes_paged if served else None,
        "swap_ms": served.swap_ms if served else None,
        "ttft_ms": served.ttft_ms if served else None,
        "coverage": served.coverage if served else None,
        "escalated_at": served.escalated.at_token if served and served.escalated else None,
        "prompt_tokens": len(prepared.request.prompt),
        "tokens": finished.completion_tokens if finished else None,
        "outcome": outcome,
    }
