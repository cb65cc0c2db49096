"""What a soak blames and what it lets pass, without a service."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from benchmarks.soak import MODES, Question, Soaked, Tally, _streamed, _too_much, _whole, behave, questions, sample
from demo.tasks.registry import TASKS

ASKED = Question("sql", "select", "mask")
GOOD = Soaked(1.0, 10, 0, {}, [], 0, 0.1, 0.2, 400 << 20, 401 << 20, 20, 21, 8, 8)
Handler = Callable[[httpx.Request], httpx.Response]


def tally_of(what: Callable[..., None], handler: Handler, question: Question = ASKED) -> Tally:
    tally = Tally()
    with httpx.Client(base_url="http://service", transport=httpx.MockTransport(handler)) as client:
        what(client, random.Random(0), question, "right", tally)
    return tally


def always(status: int, **kwargs: Any) -> Handler:
    return lambda request: httpx.Response(status, **kwargs)


def events(answer: str) -> str:
    return f"event: token\ndata: {{}}\n\nevent: done\ndata: {json.dumps({'answer': answer})}\n\n"


def test_an_answer_that_differs_from_the_one_alone_is_wrong() -> None:
    assert not tally_of(_whole, always(200, json={"answer": "right"})).wrong
    [blamed] = tally_of(_whole, always(200, json={"answer": "left"})).wrong
    assert "wanted 'right'" in blamed
    assert tally_of(_whole, always(500, text="boom")).wrong


def test_a_refusal_is_not_wrong_but_it_has_to_say_when_to_come_again() -> None:
    tally = tally_of(_whole, always(503, headers={"retry-after": "1"}))
    assert (tally.wrong, tally.counts) == ([], {"refused": 1})
    assert "without Retry-After" in tally_of(_whole, always(503)).wrong[0]


def test_a_stream_must_end_with_the_right_answer_but_auto_may_turn_exact_on_the_way() -> None:
    assert not tally_of(_streamed, always(200, text=events("right"))).wrong
    assert tally_of(_streamed, always(200, text=events("left"))).wrong
    assert tally_of(_streamed, always(200, text="event: token\ndata: {}\n\n")).wrong
    assert not tally_of(_streamed, always(200, text=events("left")), replace(ASKED, mode="auto")).wrong


def test_what_can_not_be_served_must_be_a_4xx() -> None:
    assert not tally_of(_too_much, always(400)).wrong
    assert tally_of(_too_much, always(200)).wrong
    assert tally_of(_too_much, always(500)).wrong


def test_a_connection_that_breaks_is_blamed() -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("reset")

    tally = Tally()
    with httpx.Client(base_url="http://service", transport=httpx.MockTransport(broken)) as client:
        behave(client, random.Random(1), {ASKED: "right"}, tally)
    assert "ReadError" in tally.wrong[0]


@pytest.mark.parametrize(
    ("change", "ok"),
    [
        ({}, True),
        ({"wrong": ["x"]}, False),
        ({"leases_left": 1}, False),
        ({"anonymous_late": 420 << 20}, False),
        ({"files_late": 40}, False),
    ],
)
def test_a_soak_is_well_without_wrong_answers_leases_and_growth(change: dict[str, Any], ok: bool) -> None:
    assert replace(GOOD, **change).ok is ok


def test_questions_are_of_every_task_and_mode() -> None:
    asked = questions()
    assert {question.task for question in asked} == {task.name for task in TASKS}
    assert {question.mode for question in asked} == set(MODES)


def test_a_sample_is_of_the_process_that_it_names() -> None:
    found = sample(os.getpid())
    assert found.anonymous > 2**20
    assert found.files > 2
    assert found.threads >= 1
