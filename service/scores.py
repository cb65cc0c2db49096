"""Log-probabilities in OpenAI's two forms: chat's list of tokens, completions' columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.requests import Score
from engine.text import Tokenizer


def chat_scores(scores: Sequence[Score], tokenizer: Tokenizer) -> dict[str, Any]:
    return {"content": [_entry(score, tokenizer) for score in scores], "refusal": None}


def _entry(score: Score, tokenizer: Tokenizer) -> dict[str, Any]:
    likeliest = [_named(token, logprob, tokenizer) for token, logprob in score.top]
    return {**_named(score.token, score.logprob, tokenizer), "top_logprobs": likeliest}


def _named(token: int, logprob: float | None, tokenizer: Tokenizer) -> dict[str, Any]:
    text, raw = tokenizer.spell(token)
    return {"token": text, "logprob": logprob, "bytes": list(raw)}


def completion_scores(scores: Sequence[Score], tokenizer: Tokenizer, start: bytes = b"") -> dict[str, Any]:
    """`start` is the text before the first of the tokens: offsets count characters from its beginning.

    The token that was taken is among `top_logprobs` even where it is not among the likeliest, as clients expect.
    """
    spelt = [tokenizer.spell(score.token) for score in scores]
    offsets, text = [], start
    for _, raw in spelt:
        offsets.append(len(text.decode(errors="ignore")))
        text += raw
    return {
        "tokens": [name for name, _ in spelt],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [_likeliest(score, tokenizer) for score in scores],
        "text_offset": offsets,
    }


def _likeliest(score: Score, tokenizer: Tokenizer) -> dict[str, float] | None:
    """By their texts; of tokens that read alike, the likelier one."""
    if score.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, logprob in (*score.top, (score.token, score.logprob)):
        found.setdefault(tokenizer.spell(token)[0], logprob)
    return found
