"""`POST /v1/chat/completions`, in OpenAI's form."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from service.answer import Prepared, Question, prepare, sampling_for
from service.chunks import chat_choices, stream_frames
from service.context import PartsDep, RequestId
from service.described import EVENTS
from service.headers import expert_headers
from service.names import wish_for
from service.parts import Parts
from service.prompts import encode_messages, last_user_text
from service.refusals import with_error_frame
from service.replies import Reply, message_choice, usage
from service.running import cancel_all, finish_all, submit
from service.schemas import ChatBody
from service.serving import Wish
from service.sse import EventStream, data_frame

router = APIRouter(tags=["openai"])


@router.post("/v1/chat/completions", responses=EVENTS)
async def chat(body: ChatBody, request: Request, name: RequestId, parts: PartsDep) -> Response:
    prepared = [await asyncio.to_thread(prepare_chat, body, name, parts)]
    running = submit(prepared, parts)
    reply = Reply.to_chat(body.model, parts)
    if body.stream:
        frames = stream_frames(reply, running, body.stream_options, chat_choices())
        guarded = with_error_frame(name, frames, data_frame)
        return EventStream(guarded, expert_headers(prepared), partial(cancel_all, running))
    finished = await finish_all(request, running)
    answer = reply.body([message_choice(finished[0])], usage=usage(running, finished))
    return JSONResponse(answer, headers=expert_headers(prepared, finished))


def prepare_chat(body: ChatBody, name: str, parts: Parts) -> Prepared:
    ignored = body.ignored()
    wish = wish_for(body.model, body.expert.wish() if body.expert else Wish(), parts)
    prompt = encode_messages(body.messages, parts.engine.tokenizer)
    sampling = sampling_for(body, prompt, body.limit(), parts)
    return prepare(Question(name, "messages", last_user_text(body.messages), prompt, wish, sampling, ignored), parts)
