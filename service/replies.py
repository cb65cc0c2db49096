"""Bodies of OpenAI's answers, whole and in chunks, with the receipt in `usage.expert`. Pure dictionaries."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.requests import FinishedEvent
from service.parts import Parts
from service.running import Running


@dataclass(frozen=True, slots=True)
class Reply:
    """What all chunks of one answer share."""

    kind: str  # "chat.completion" or "text_completion"
    model: str
    fingerprint: str
    id: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def to_chat(cls, model: str, parts: Parts) -> Reply:
        return cls("chat.completion", model, parts.engine.card.fingerprint[:16], f"chatcmpl-{uuid.uuid4().hex}")

    @classmethod
    def to_completion(cls, model: str, parts: Parts) -> Reply:
        return cls("text_completion", model, parts.engine.card.fingerprint[:16], f"cmpl-{uuid.uuid4().hex}")

    def body(self, choices: Sequence[dict[str, Any]], **more: object) -> dict[str, Any]:
        return self._with(self.kind, choices, more)

    def chunk(self, choices: Sequence[dict[str, Any]], **more: object) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        return self._with(kind, choices, more)

    def _with(self, kind: str, choices: Sequence[dict[str, Any]], more: dict[str, object]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": list(choices),
            **more,
        }


def token_usage(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},  # no prefix is shared between requests
    }


def usage(running: Sequence[Running], finished: Sequence[FinishedEvent]) -> dict[str, Any]:
    """`expert` is the receipt; a list of receipts, in the order of the prompts, where there were several."""
    receipts = [one.receipt(event).json() for one, event in zip(running, finished, strict=True)]
    tokens = token_usage(sum(f.prompt_tokens for f in finished), sum(f.completion_tokens for f in finished))
    return {**tokens, "expert": receipts[0] if len(receipts) == 1 else receipts}


def message_choice(finished: FinishedEvent) -> dict[str, Any]:
    message = {"role": "assistant", "content": finished.text}
    return {"index": 0, "message": message, "logprobs": None, "finish_reason": finished.reason}


def delta_choice(delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}


def text_choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
