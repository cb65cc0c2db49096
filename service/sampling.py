"""From the fields of a request to the engine's sampling."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.constraints import Constraint
from engine.requests import Sampling
from service.parts import Parts
from service.schemas import SamplingFields
from store.errors import InvalidInput

TOKEN_ID = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a route asks for beside the fields that all routes share. `field` is what it calls its prompt."""

    field: str
    scores: int | None = None
    prompt_scores: bool = False
    constraint: Constraint | None = None


def sampling_for(
    fields: SamplingFields, prompt: Sequence[int], limit: int | None, parts: Parts, asked: Asked
) -> Sampling:
    """The engine's sampling. Where a request names no limit, the settings' one, as far as the context has room.

    Raises InvalidInput where prompt and answer are more than the context holds: before anything is retrieved, for such
    a text is often a whole file. Greedy unless a temperature is asked for: the evidence of a profile was measured so.
    """
    room = parts.engine.plan.max_context - len(prompt)
    tokens = limit if limit is not None else max(1, min(room, parts.settings.answer_tokens))
    parts.engine.admission.check_length(len(prompt), tokens, asked.field)
    return Sampling(
        max_tokens=tokens,
        temperature=_or(fields.temperature, 0.0),
        top_p=_or(fields.top_p, 1.0),
        top_k=max(0, fields.top_k or 0),
        min_p=fields.min_p or 0.0,
        seed=fields.seed,
        stop=fields.stops,
        stop_tokens=frozenset(fields.stop_token_ids or ()),
        include_stop=fields.include_stop_str_in_output or False,
        ignore_eos=fields.ignore_eos or False,
        min_tokens=fields.min_tokens or 0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=_or(fields.repetition_penalty, 1.0),
        bias=biases(fields.logit_bias or {}, parts.engine.card.vocab),
        logprobs=asked.scores,
        prompt_logprobs=asked.prompt_scores,
        constraint=asked.constraint,
    )


def biases(written: Mapping[str, float], vocab: int) -> tuple[tuple[int, float], ...]:
    for token in written:
        if not TOKEN_ID.fullmatch(token) or int(token) >= vocab:
            raise InvalidInput(
                f"`logit_bias` names tokens by their ids, 0 to {vocab - 1} here; got {token!r}. /tokenize tells ids.",
                param="logit_bias",
            )
    return tuple((int(token), bias) for token, bias in written.items())


def seed_of(seed: int | None, number: int) -> int | None:
    """A seed for each of the answers to one prompt: the first has the request's own, the others' follow from it."""
    if seed is None or not number:
        return seed
    mixed = hashlib.sha256(f"{seed}/{number}".encode()).digest()[:8]
    return int.from_bytes(mixed, "big", signed=True)


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value
