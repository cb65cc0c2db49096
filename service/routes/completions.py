"""`POST /v1/completions`, in OpenAI's form: one prompt or several, as text or as token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from engine.requests import FinishedEvent
from service.answer import Prepared, Question, spread
from service.asking import AskerDep, asking
from service.bodies import CompletionBody
from service.callers import Caller, openai_caller
from service.chunks import CompletionChoices, stream_frames
from service.constrain import compiled, wanted_of
from service.headers import expert_headers
from service.names import wish_for
from service.parts import Parts
from service.prompts import encode_prompt, refuse_hopeless
from service.refusals import with_error_frame
from service.replies import Reply, text_choice, usage
from service.running import Running, cancel_all, finish_all, submit
from service.sampling import Asked, sampling_for
from service.scores import completion_scores
from service.serving import Wish
from service.sse import EventStream, data_frame
from store.errors import InvalidInput

router = APIRouter(tags=["openai"])

OPENAI_LIMIT = 16  # tokens of a completion that names no limit, as OpenAI's clients expect


@router.post("/v1/completions")
async def complete(body: CompletionBody, request: Request, asker: AskerDep) -> Response:
    """Continue a text, or several, in OpenAI's form. `model` or `expert` may name a task; the receipt is in
    `usage.expert`. With `stream` as chunks."""
    name, caller, parts = asker
    with asking(*asker) as began:
        prepared = await asyncio.to_thread(prepare_completions, body, name, parts, openai_caller(caller, body))
        running = submit(prepared, parts, began)
    reply = Reply.to_completion(body.model, parts)
    if body.stream:
        tokenizer = parts.engine.tokenizer
        choices = [CompletionChoices(place, tokenizer, echo_of(body, one)) for place, one in enumerate(prepared)]
        frames = stream_frames(reply, running, body.stream_options, choices)
        guarded = with_error_frame(name, frames, data_frame)
        return EventStream(guarded, expert_headers(prepared), partial(cancel_all, running))
    finished = await finish_all(request, running)
    answer = reply.body(given(body, running, finished, parts), usage=usage(running, finished))
    return JSONResponse(answer, headers=expert_headers(prepared, finished))


def prepare_completions(body: CompletionBody, name: str, parts: Parts, caller: Caller) -> list[Prepared]:
    ignored, tries, prompts = body.ignored(), body.tries, body.prompts()
    wish = wish_for(body.model, body.expert.wish() if body.expert else Wish(), parts)
    wanted = wanted_of(body)
    constraint = None if wanted is None else compiled(wanted, parts.engine.tokenizer)
    limit = OPENAI_LIMIT if body.max_tokens is None else body.max_tokens
    if not limit and not body.echo:
        raise InvalidInput("`max_tokens: 0` asks for no answer, which needs `echo: true`.", param="max_tokens")
    scores = 0 if body.scores is None and (tries > body.choices or not limit) else body.scores
    asked = Asked("prompt", scores, scores is not None and bool(body.echo), constraint)
    questions = []
    for place, written in enumerate(prompts):
        refuse_hopeless(len(written), "prompt", parts)  # of token ids it is their number
        prompt, text = encode_prompt(written, parts.engine.tokenizer, parts.engine.card)
        sampling = sampling_for(body, prompt, limit, parts, asked)
        own = name if len(prompts) == 1 else f"{name}/{place}"
        questions.append(Question(own, "prompt", text, prompt, wish, sampling, ignored, caller, not body.stream))
    return spread(questions, tries, parts)


def echo_of(body: CompletionBody, prepared: Prepared) -> str:
    return prepared.question.text or "" if body.echo else ""


def given(
    body: CompletionBody, running: Sequence[Running], finished: Sequence[FinishedEvent], parts: Parts
) -> list[dict[str, Any]]:
    """The `n` likeliest of each prompt's answers, by the mean log-probability of a token where there are more."""
    choices: list[dict[str, Any]] = []
    for start in range(0, len(finished), body.tries):
        places = list(range(start, start + body.tries))
        if body.tries > body.choices:
            places.sort(key=lambda place: _mean(finished[place]), reverse=True)
        for place in places[: body.choices]:
            choices.append(_choice(len(choices), body, running[place].prepared, finished[place], parts))
    return choices


def _mean(finished: FinishedEvent) -> float:
    return sum(score.logprob or 0.0 for score in finished.scores) / max(1, len(finished.scores))


def _choice(
    index: int, body: CompletionBody, prepared: Prepared, finished: FinishedEvent, parts: Parts
) -> dict[str, Any]:
    scores = (*finished.prompt_scores, *finished.scores)
    logprobs = None if body.scores is None else completion_scores(scores, parts.engine.tokenizer)
    return text_choice(index, echo_of(body, prepared) + finished.text, finished.reason, logprobs)
