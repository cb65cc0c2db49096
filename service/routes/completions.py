"""`POST /v1/completions`, in OpenAI's form: one prompt or several, as text or as token ids."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from service.answer import Prepared, Question, prepare, sampling_for
from service.chunks import completion_choices, stream_frames
from service.context import PartsDep, RequestId
from service.described import EVENTS
from service.headers import expert_headers
from service.names import wish_for
from service.parts import Parts
from service.prompts import encode_prompt
from service.refusals import with_error_frame
from service.replies import Reply, text_choice, usage
from service.running import cancel_all, finish_all, submit
from service.schemas import CompletionBody
from service.serving import Wish
from service.sse import EventStream, data_frame

router = APIRouter(tags=["openai"])

OPENAI_LIMIT = 16  # tokens of a completion that names no limit, as OpenAI's clients expect


@router.post("/v1/completions", responses=EVENTS)
async def complete(body: CompletionBody, request: Request, name: RequestId, parts: PartsDep) -> Response:
    prepared = await asyncio.to_thread(prepare_completions, body, name, parts)
    running = submit(prepared, parts)
    reply = Reply.to_completion(body.model, parts)
    if body.stream:
        frames = stream_frames(reply, running, body.stream_options, completion_choices)
        guarded = with_error_frame(name, frames, data_frame)
        return EventStream(guarded, expert_headers(prepared), partial(cancel_all, running))
    finished = await finish_all(request, running)
    choices = [text_choice(place, each.text, each.reason) for place, each in enumerate(finished)]
    answer = reply.body(choices, usage=usage(running, finished))
    return JSONResponse(answer, headers=expert_headers(prepared, finished))


def prepare_completions(body: CompletionBody, name: str, parts: Parts) -> list[Prepared]:
    ignored = body.ignored()
    wish = wish_for(body.model, body.expert.wish() if body.expert else Wish(), parts)
    prompts = body.prompts()
    prepared = []
    for place, written in enumerate(prompts):
        prompt, text = encode_prompt(written, parts.engine.tokenizer, parts.engine.card)
        sampling = sampling_for(body, prompt, body.max_tokens or OPENAI_LIMIT, parts)
        own = name if len(prompts) == 1 else f"{name}/{place}"
        prepared.append(prepare(Question(own, "prompt", text, prompt, wish, sampling, ignored), parts))
    return prepared
