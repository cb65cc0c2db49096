"""What a query costs the service beside the engine, in calls of Python and of C: a count that no other work disturbs.

Bounds are some tenth above what was counted: who goes over one has made every query slower, and should know it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import FrameType
from typing import Any

import pytest
from fastapi import FastAPI

from engine.embedder import HashEmbedder
from engine.requests import TokenEvent
from service.answer_reader import Forms
from service.app import create_app
from service.chunks import ChatChoices
from service.context import Opening
from service.parts import Parts
from service.retrieval import Retriever
from service.sse import DataFrames
from store.records import Exemplar
from store.vectors import VectorIndex

QUERIES = 8
HEADERS = {"host": "testserver", "content-type": "application/json", "accept": "*/*", "user-agent": "test"}


class Calls:
    """Counted on each thread that it is put to, while it is `on`."""

    def __init__(self) -> None:
        self.on, self.count = False, 0

    def __call__(self, _frame: FrameType, event: str, _argument: object) -> None:
        if self.on and event in ("call", "c_call"):
            self.count += 1


async def ask(app: FastAPI, body: dict[str, Any]) -> bytes:
    """As a server calls the application; the answer's body."""
    text, said = json.dumps(body).encode(), list[dict[str, Any]]()
    asked = iter([{"type": "http.request", "body": text, "more_body": False}])

    async def receive() -> Any:
        found = next(asked, None)
        return found if found is not None else await asyncio.Event().wait()  # the client stays

    async def send(message: Any) -> None:
        said.append(message)

    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    path = "/v1/chat/completions"
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http"}
    scope |= {"method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
    await app({**scope, "headers": headers, "server": ("testserver", 80), "client": ("client", 1)}, receive, send)
    assert said[0]["status"] == 200, said
    return b"".join(one.get("body", b"") for one in said)


async def asked_often(app: FastAPI, body: dict[str, Any]) -> tuple[float, float]:
    loop, threads = Calls(), Calls()
    with ThreadPoolExecutor(1, initializer=sys.setprofile, initargs=(threads,)) as executor:
        asyncio.get_running_loop().set_default_executor(executor)
        sys.setprofile(loop)
        try:
            for number in range(QUERIES + 3):
                loop.on = threads.on = number >= 3  # the first ones fill caches
                await ask(app, body)
        finally:
            sys.setprofile(None)
    return loop.count / QUERIES, threads.count / QUERIES


@pytest.fixture
def cost(parts: Parts) -> Callable[[dict[str, Any]], tuple[float, float]]:
    """Calls a query: on the event loop, and on the thread that prepares it. Nobody else is on them."""
    app = create_app(lambda: nullcontext(parts))
    app.state.opening = Opening()
    app.state.opening.opened(parts)
    return lambda body: asyncio.run(asked_often(app, body))


BODY = {"model": "tiny:cooking", "messages": [{"role": "user", "content": "how long do I boil an egg"}]}


def test_a_named_query_costs_the_event_loop_and_its_thread_few_calls(
    cost: Callable[[dict[str, Any]], tuple[float, float]],
) -> None:
    loop, prepared = cost({**BODY, "max_tokens": 4})
    assert loop < 1750
    assert prepared < 670


def test_a_streamed_token_costs_few_calls() -> None:
    tokenizer: Any = None  # only scores would need it
    choices, frames, calls = ChatChoices(0, tokenizer, Forms()), DataFrames({"id": "x"}), Calls()
    calls.on = True
    sys.setprofile(calls)
    try:
        for number in range(100):
            frames.frame({"choices": choices(TokenEvent(0, number, "word "))})
    finally:
        sys.setprofile(None)
    assert calls.count / 100 < 23


def test_a_task_that_is_compared_costs_a_retrieved_query_few_calls() -> None:
    """Each task's exemplars are ranked for every query that names none."""
    embedder = HashEmbedder(64)

    def cost_of(tasks: int) -> int:
        texts = [(f"task {number}", f"{word} {number}") for number in range(tasks) for word in ("boil", "fry")]
        vectors = embedder.embed([text for _, text in texts])
        exemplars = [Exemplar(*text, vector, embedder.id) for text, vector in zip(texts, vectors, strict=True)]
        retriever = Retriever(embedder, VectorIndex.rebuild(exemplars), 0.5, exemplars)
        [hits] = retriever.index.search(vectors[:1], 64)
        calls = Calls()
        calls.on = True
        sys.setprofile(calls)
        try:
            retriever._rank(vectors[:1], hits)
        finally:
            sys.setprofile(None)
        return calls.count

    assert (cost_of(30) - cost_of(10)) / 20 < 28
