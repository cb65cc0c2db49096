"""The receipt in headers: what is known before the answer, and where the answer is whole also what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from engine.requests import FinishedEvent
from service.answer import Prepared
from store.records import NO_TASK


def expert_headers(prepared: Sequence[Prepared], finished: Sequence[FinishedEvent] = ()) -> dict[str, str]:
    """`x-expert-*`, percent-encoded where a name is not plain ASCII; several prompts are joined by commas."""
    serving = [one.serving for one in prepared]
    columns: dict[str, list[object]] = {
        "task": [s.retrieval.task or NO_TASK for s in serving],
        "mode": [s.mode for s in serving],
        "keep": [f"{s.keep:g}" for s in serving],
        "reason": [s.retrieval.reason for s in serving],
        "profile": [s.profile_id or "none" for s in serving],
        "doubts": [len(s.doubts) for s in serving],
    }
    if finished:
        columns["experts"] = [f.served.experts for f in finished]
        columns["experts-paged"] = [f.served.experts_paged for f in finished]
        columns["bytes-paged"] = [f.served.bytes_paged for f in finished]
        columns["escalated"] = [e.at_token if (e := f.served.escalated) else "none" for f in finished]
    return {f"x-expert-{name}": ",".join(map(_written, values)) for name, values in columns.items()}


def _written(value: object) -> str:
    return quote(value, safe=" ") if isinstance(value, str) else str(value)
