"""`POST /v1/query`: query in; task, answer and receipt out, whole or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from engine.requests import FinishedEvent
from engine.text import Tokenizer
from service.answer import Prepared, Question, prepare
from service.answer_reader import AnswerReader, Forms, message_of
from service.asking import AskerDep, asking
from service.callers import Caller
from service.described import EVENTS
from service.headers import expert_headers
from service.merging import merged
from service.parts import Parts
from service.prompts import encode_query, refuse_hopeless
from service.refusals import with_error_frame
from service.running import Running, cancel_all, finish_all, submit
from service.sampling import Asked, sampling_for
from service.schemas import QueryBody
from service.sse import EventStream, named_frame
from service.thought_reader import Thought

router = APIRouter(tags=["query"])


@router.post("/v1/query", responses=EVENTS)
async def query(body: QueryBody, request: Request, asker: AskerDep) -> Response:
    """Ask. The task is retrieved by the query's words unless `task` names one; `receipt` says what the answer was
    served from. With `stream` the events `task`, `token` and `done`."""
    name, caller, parts = asker
    with asking(*asker) as began:
        prepared = await asyncio.to_thread(prepare_query, body, name, parts, caller.saying(body))
        running = submit([prepared], parts, began)
    if body.stream:
        frames = with_error_frame(name, query_frames(running[0], parts.engine.tokenizer), partial(named_frame, "error"))
        return EventStream(frames, expert_headers([prepared]), partial(cancel_all, running))
    finished = await finish_all(request, running)
    answer = query_answer(running[0], finished[0], parts.engine.tokenizer)
    return JSONResponse(answer, headers=expert_headers([prepared], finished))


def prepare_query(body: QueryBody, name: str, parts: Parts, caller: Caller) -> Prepared:
    refuse_hopeless(len(body.query), "query", parts)
    prompt = encode_query(body.query, parts.engine.tokenizer)
    sampling = sampling_for(body, prompt, body.max_tokens, parts, Asked("query"))
    sampling = replace(sampling, channels=parts.engine.tokenizer.has_channels)
    question = Question(name, "query", body.query, prompt, body.wish(), sampling, caller=caller, whole=not body.stream)
    return prepare(question, parts)


async def query_frames(running: Running, tokenizer: Tokenizer) -> AsyncIterator[bytes]:
    """`task`, then each `token`, of the thought or of the answer, then `done` with what the plain answer would have
    been."""
    reader = AnswerReader(forms_of(running, tokenizer))
    yield named_frame("task", query_task(running))
    async for found in merged([running]):
        if isinstance(found, bytes):
            yield found
            continue
        frames = b""
        for event in found[1]:
            for piece in reader.flush() if isinstance(event, FinishedEvent) else reader.push(event.text):
                said = {"reasoning": piece.text} if isinstance(piece, Thought) else {"text": piece}
                frames += named_frame("token", said)
            if isinstance(event, FinishedEvent):
                frames += named_frame("done", query_answer(running, event, tokenizer))
        if frames:
            yield frames


def forms_of(running: Running, tokenizer: Tokenizer) -> Forms:
    return Forms.after(running.prepared.question.prompt, tokenizer)


def query_task(running: Running) -> dict[str, Any]:
    prepared, predicted = running.prepared, running.predicted
    serving = prepared.serving
    return {
        "id": prepared.question.id,
        "task": serving.retrieval.task,
        "similarity": serving.retrieval.similarity,
        "reason": serving.retrieval.reason,
        "mode": serving.mode,
        "keep": serving.keep,
        "predicted_bytes": predicted.bytes if predicted else None,
        "predicted_swap_ms": 1000 * predicted.seconds if predicted else None,
    }


def query_answer(running: Running, finished: FinishedEvent, tokenizer: Tokenizer) -> dict[str, Any]:
    """With `reasoning` where the model thought before it answered."""
    receipt = running.receipt(finished)
    said = message_of(finished.text, forms_of(running, tokenizer))
    thought = {"reasoning": said["reasoning_content"]} if "reasoning_content" in said else {}
    return {
        "id": running.prepared.question.id,
        "task": receipt.task,
        "answer": said["content"],
        **thought,
        "finish_reason": finished.reason,
        "receipt": receipt.json(),
    }
