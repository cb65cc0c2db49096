"""`POST /v1/chat/completions`, in OpenAI's form."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from engine.requests import FinishedEvent
from service.answer import Prepared, Question, spread
from service.answer_reader import Forms, message_of
from service.asking import AskerDep, asking
from service.bodies import ChatBody
from service.callers import Caller, chat_caller, text_to_retrieve
from service.chunks import ChatChoices, finish_reason, stream_frames
from service.constrain import compiled, wanted_of
from service.headers import expert_headers
from service.messages import NamedTool
from service.names import wish_for
from service.parts import Parts
from service.prompts import encode_chat, refuse_hopeless
from service.refusals import with_error_frame
from service.replies import Reply, message_choice, usage
from service.running import cancel_all, finish_all, submit
from service.sampling import Asked, sampling_for
from service.scores import chat_scores
from service.serving import Wish
from service.sse import EventStream, data_frame
from service.tools import form_for, with_tools

router = APIRouter(tags=["openai"])


@dataclass(frozen=True, slots=True)
class Conversation:
    """`forms` are how the model writes what is no plain text."""

    rows: list[Prepared]
    forms: Forms


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, request: Request, asker: AskerDep) -> Response:
    """Answer a conversation, in OpenAI's form. `model` or `expert` may name a task, else the user's last message tells
    it; the receipt is in `usage.expert`. With `stream` as chunks."""
    name, caller, parts = asker
    with asking(*asker) as began:
        asked = await asyncio.to_thread(prepare_chat, body, name, parts, chat_caller(caller, body))
        running = submit(asked.rows, parts, began)
    reply = Reply.to_chat(body.model, parts)
    if body.stream:
        named, tokenizer = isinstance(body.tool_choice, NamedTool), parts.engine.tokenizer
        ended = partial(remember, asked, parts)
        choices = [ChatChoices(index, tokenizer, asked.forms, named, ended) for index in range(len(running))]
        frames = stream_frames(reply, running, body.stream_options, choices)
        guarded = with_error_frame(name, frames, data_frame)
        return EventStream(guarded, expert_headers(asked.rows), partial(cancel_all, running))
    finished = await finish_all(request, running)
    choices_of = [
        choice(index, remember(asked, parts, event), event, body, parts) for index, event in enumerate(finished)
    ]
    answer = reply.body(choices_of, usage=usage(running, finished))
    return JSONResponse(answer, headers=expert_headers(asked.rows, finished))


def prepare_chat(body: ChatBody, name: str, parts: Parts, caller: Caller) -> Conversation:
    ignored, tokenizer = body.ignored(), parts.engine.tokenizer
    wish = wish_for(body.model, body.expert.wish() if body.expert else Wish(), parts)
    form = form_for(tokenizer) if body.offered else None
    refuse_hopeless(sum(len(message.text) for message in body.messages), "messages", parts)
    prompt, unread = encode_chat(body.messages, body, tokenizer)
    wanted = wanted_of(body) if form is None else with_tools(body, wanted_of(body), form)
    constraint = None if wanted is None else compiled(wanted, tokenizer)
    sampling = sampling_for(body, prompt, body.limit(), parts, Asked("messages", body.scores, constraint=constraint))
    free = wanted is None or (form is not None and not wanted.is_json)  # what a grammar rules has no thought
    forms = Forms.after(prompt, tokenizer, form) if free else Forms.ruled(form)
    sampling = replace(sampling, channels=forms.channels)
    text = text_to_retrieve(body.messages)
    question = Question(
        name, "messages", text, prompt, wish, sampling, tuple(sorted((*ignored, *unread))), caller, not body.stream
    )
    return Conversation(spread([question], body.choices, parts), forms)


def remember(asked: Conversation, parts: Parts, finished: FinishedEvent) -> dict[str, Any]:
    """The assistant's message, from which the conversation may go on."""
    message = message_of(finished.text, asked.forms)
    parts.sessions.answered(asked.rows[0].question.caller, message)
    return message


def choice(
    index: int, message: dict[str, Any], finished: FinishedEvent, body: ChatBody, parts: Parts
) -> dict[str, Any]:
    reason = finish_reason(finished, len(message.get("tool_calls", ())), isinstance(body.tool_choice, NamedTool))
    logprobs = chat_scores(finished.scores, parts.engine.tokenizer) if body.logprobs else None
    return message_choice(index, message, reason, logprobs)
