"""The real openai client against a live server and a real engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import openai
import pytest
from fastapi import FastAPI

EGG, ROWS = "how long do I boil an egg", "select rows from orders"


@pytest.fixture(scope="module")
def api(app: FastAPI, live: Callable[[FastAPI], AbstractContextManager[str]]) -> Iterator[openai.OpenAI]:
    with live(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed_and_found(api: openai.OpenAI) -> None:
    names = [model.id for model in api.models.list()]
    assert names == ["tiny", "tiny:cooking", "tiny:sql", "tiny:unproven"]
    assert api.models.retrieve("tiny:sql").owned_by == "moepager"


def test_a_chat_is_answered_with_its_receipt(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": EGG}], max_tokens=8)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    receipt = answer.usage.model_extra["expert"] if answer.usage.model_extra else None
    assert receipt["task"] == "cooking"
    assert receipt["experts"] == 12


def test_the_raw_answer_carries_headers_and_the_clients_id(api: openai.OpenAI) -> None:
    raw = api.chat.completions.with_raw_response.create(
        model="tiny:sql",
        messages=[{"role": "user", "content": EGG}],
        max_tokens=2,
        extra_headers={"x-request-id": "from-the-client"},
    )
    assert raw.headers["x-request-id"] == "from-the-client"
    assert raw.headers["x-expert-task"] == "sql"


def test_a_stream_adds_up_to_the_plain_answer(api: openai.OpenAI) -> None:
    plain = api.chat.completions.create(model="tiny", messages=[{"role": "user", "content": EGG}], max_tokens=8)
    chunks = list(
        api.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": EGG}],
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == plain.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_options_of_our_own_go_through_the_extra_body(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": EGG}],
        max_tokens=2,
        extra_body={"expert": {"task": "sql", "keep": 0.25}},
    )
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    assert (answer.usage.model_extra["expert"]["task"], answer.usage.model_extra["expert"]["keep"]) == ("sql", 0.25)


def test_completions_of_several_prompts(api: openai.OpenAI) -> None:
    answer = api.completions.create(model="tiny", prompt=[EGG, ROWS], max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]
    streamed = ["", ""]
    for chunk in api.completions.create(model="tiny", prompt=[EGG, ROWS], max_tokens=4, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]


def test_errors_are_the_clients_own(api: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": EGG}]
    with pytest.raises(openai.NotFoundError) as missing:
        api.chat.completions.create(model="gpt-4o", messages=messages)  # type: ignore[arg-type]
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        api.chat.completions.create(model="tiny", messages=messages, n=200)  # type: ignore[arg-type]
    assert refused.value.param == "n"
    with pytest.raises(openai.BadRequestError) as long:
        api.chat.completions.create(model="tiny", messages=messages, max_tokens=9999, stream=True)  # type: ignore[arg-type]
    assert long.value.code == "context_length_exceeded"


def test_an_error_in_mid_stream_is_raised_by_the_client(
    scripted_app: FastAPI, live: Callable[[FastAPI], AbstractContextManager[str]], worker: object
) -> None:
    worker.failure = RuntimeError("broken")  # type: ignore[attr-defined]
    seen: list[str | None] = []
    with live(scripted_app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": EGG}], stream=True)
        with pytest.raises(openai.APIError, match="failed on this request"):
            seen.extend(chunk.choices[0].delta.content for chunk in stream)
    assert seen == ["a", "b", "c"]


def test_the_async_client_streams_side_by_side(
    app: FastAPI, live: Callable[[FastAPI], AbstractContextManager[str]]
) -> None:
    import asyncio

    async def one(client: openai.AsyncOpenAI, text: str) -> str:
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": text}], max_tokens=8, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def both(url: str) -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(one(client, text) for text in (EGG, ROWS, EGG, ROWS)))
            return together, [await one(client, EGG), await one(client, ROWS)]

    with live(app) as url:
        together, alone = asyncio.run(both(url))
    assert together == [*alone, *alone]
