"""Bodies of OpenAI's answers, whole and in chunks, with the receipt in `usage.expert`. Pure dictionaries."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.requests import FinishedEvent
from service.ids import fresh_id
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
        return cls("chat.completion", model, parts.engine.card.fingerprint[:16], f"chatcmpl-{fresh_id()}")

    @classmethod
    def to_completion(cls, model: str, parts: Parts) -> Reply:
        return cls("text_completion", model, parts.engine.card.fingerprint[:16], f"cmpl-{fresh_id()}")

    def body(self, choices: Sequence[dict[str, Any]], **more: object) -> dict[str, Any]:
        return {**self._head(self.kind), "choices": list(choices), **more}

    def chunk_head(self) -> dict[str, Any]:
        """What every chunk begins with; its `choices` come next."""
        return self._head("chat.completion.chunk" if self.kind == "chat.completion" else self.kind)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def token_usage(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},  # no prefix is shared between requests
    }


def prompt_tokens(running: Sequence[Running]) -> int:
    """Several answers to one prompt share it, so it counts once."""
    prompts = {id(one.prepared.question): len(one.prepared.question.prompt) for one in running}
    return sum(prompts.values())


def usage(running: Sequence[Running], finished: Sequence[FinishedEvent]) -> dict[str, Any]:
    """`expert` is the receipt; a list of receipts, one an answer in their order, where there were several."""
    receipts = [one.receipt(event).json() for one, event in zip(running, finished, strict=True)]
    tokens = token_usage(prompt_tokens(running), sum(event.completion_tokens for event in finished))
    return {**tokens, "expert": receipts[0] if len(receipts) == 1 else receipts}


def message_choice(
    index: int, message: dict[str, Any], reason: str, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def delta_choice(
    index: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def text_choice(index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
