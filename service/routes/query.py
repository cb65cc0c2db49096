"""`POST /v1/query`: query in; task, answer and receipt out, whole or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from engine.requests import FinishedEvent
from service.answer import Prepared, Question, prepare
from service.callers import Caller, CallerDep
from service.context import PartsDep, RequestId
from service.described import EVENTS
from service.headers import expert_headers
from service.parts import Parts
from service.prompts import encode_query
from service.refusals import with_error_frame
from service.running import Running, cancel_all, finish_all, merged, submit
from service.sampling import sampling_for
from service.schemas import QueryBody
from service.sse import EventStream, named_frame

router = APIRouter(tags=["query"])


@router.post("/v1/query", responses=EVENTS)
async def query(body: QueryBody, request: Request, name: RequestId, caller: CallerDep, parts: PartsDep) -> Response:
    prepared = await asyncio.to_thread(prepare_query, body, name, parts, caller.saying(body))
    running = submit([prepared], parts)
    if body.stream:
        frames = with_error_frame(name, query_frames(running[0]), partial(named_frame, "error"))
        return EventStream(frames, expert_headers([prepared]), partial(cancel_all, running))
    finished = await finish_all(request, running)
    return JSONResponse(query_answer(running[0], finished[0]), headers=expert_headers([prepared], finished))


def prepare_query(body: QueryBody, name: str, parts: Parts, caller: Caller) -> Prepared:
    prompt = encode_query(body.query, parts.engine.tokenizer)
    sampling = sampling_for(body, prompt, body.max_tokens, parts)
    question = Question(name, "query", body.query, prompt, body.wish(), sampling, caller=caller, whole=not body.stream)
    return prepare(question, parts)


async def query_frames(running: Running) -> AsyncIterator[bytes]:
    """`task`, then each `token`, then `done` with what the plain answer would have been."""
    yield named_frame("task", query_task(running))
    async for found in merged([running]):
        if isinstance(found, bytes):
            yield found
        elif isinstance(found[1], FinishedEvent):
            yield named_frame("done", query_answer(running, found[1]))
        elif found[1].text:
            yield named_frame("token", {"text": found[1].text})


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


def query_answer(running: Running, finished: FinishedEvent) -> dict[str, Any]:
    receipt = running.receipt(finished)
    return {
        "id": running.prepared.question.id,
        "task": receipt.task,
        "answer": finished.text,
        "finish_reason": finished.reason,
        "receipt": receipt.json(),
    }
