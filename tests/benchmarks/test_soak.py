"""What a soak asks, what it blames and what it lets pass, without a service; and a disk that fails when told to."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.faulty_server import EIO, faulty
from benchmarks.soak import IDLE, Soaked, errors_logged, leftovers, sample
from benchmarks.soak_questions import CHAT, MODES, QUERY, NoAnswerError, Question, Said, Talk, questions, talks
from benchmarks.soak_traffic import Clients, Reference, Tally
from demo.tasks.registry import TASKS

ASKED = Question("mask", QUERY, {"query": "select", "task": "sql", "max_tokens": 4})
TALKED = Question("chat", CHAT, {"model": "m", "messages": [{"role": "user", "content": "x"}]})
RIGHT = Said("right", "sql", "pinned")
GOOD = Soaked(1.0, {"mask": 9}, 3, 0, {}, [], dict.fromkeys(IDLE, 0.0), 0.1, 0.2, 400 << 20, 401 << 20, 20, 21, 8, 9)
Handler = Callable[[httpx.Request], httpx.Response]


class FirstAlways(random.Random):
    """Chooses the first of everything: to ask, whole; with `streamed` as a stream."""

    streamed = False

    def choices(self, population: Any, *_: Any, **__: Any) -> Any:
        return [population[0]]

    def choice(self, population: Any) -> Any:
        return population[0]

    def random(self) -> float:
        return 0.0 if self.streamed else 0.99


def client_of(handler: Handler) -> httpx.Client:
    return httpx.Client(base_url="http://service", transport=httpx.MockTransport(handler))


def tally_of(handler: Handler, streamed: bool = False, disk_failed: bool = False, question: Question = ASKED) -> Tally:
    tally, rng = Tally(), FirstAlways(0)
    rng.streamed = streamed
    crowd = Clients(Reference({question: (RIGHT, RIGHT)}, {}), tally, lambda: disk_failed)
    with client_of(handler) as client:
        crowd.behave(client, rng)
    return tally


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.soak_traffic.REST_SECONDS", 0)


def always(status: int, **kwargs: Any) -> Handler:
    return lambda request: httpx.Response(status, **kwargs)


def error(code: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": "m"}}


def reply(answer: str = "right", task: str = "sql") -> dict[str, Any]:
    return {"answer": answer, "task": task, "receipt": {"reason": "pinned"}}


def events(last: dict[str, Any]) -> str:
    return f'event: token\ndata: {{"text": "ri"}}\n\n: waiting\n\nevent: done\ndata: {json.dumps(last)}\n\n'


def test_an_answer_or_a_task_that_differs_from_the_one_alone_is_wrong() -> None:
    assert not tally_of(always(200, json=reply())).wrong
    [blamed] = tally_of(always(200, json=reply("left"))).wrong
    assert "wanted [Said(text='right'" in blamed
    assert tally_of(always(200, json=reply(task="shell"))).wrong
    assert not tally_of(always(200, text=events(reply())), streamed=True).wrong
    assert tally_of(always(200, text=events(reply("left"))), streamed=True).wrong


def test_a_chat_is_read_from_its_message_or_its_chunks() -> None:
    expert = {"task": "sql", "reason": "pinned"}
    whole = {"choices": [{"message": {"content": "right"}}], "usage": {"expert": expert}}
    assert not tally_of(always(200, json=whole), question=TALKED).wrong
    chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in ("ri", "ght")]
    lines = [*chunks, {"choices": [{"delta": {}}], "expert": expert}]
    text = "".join(f"data: {json.dumps(one)}\n\n" for one in lines)
    assert not tally_of(always(200, text=text + "data: [DONE]\n\n"), streamed=True, question=TALKED).wrong
    [torn] = tally_of(always(200, text=text), streamed=True, question=TALKED).wrong
    assert "no end" in torn


def test_a_refusal_is_not_wrong_but_it_has_to_say_when_to_come_again() -> None:
    tally = tally_of(always(503, headers={"retry-after": "1"}, json=error("busy")))
    assert (tally.wrong, tally.counts) == ([], {"refused": 1})
    assert "without Retry-After" in tally_of(always(503, json=error("busy"))).wrong[0]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_disks_error_is_right_only_where_the_disk_was_made_to_fail(streamed: bool) -> None:
    broken = always(503, headers={"retry-after": "1"}, json=error("disk_error"))
    if streamed:
        broken = always(200, text=f"event: error\ndata: {json.dumps(error('disk_error'))}\n\n")
    assert tally_of(broken, streamed).wrong
    tally = tally_of(broken, streamed, disk_failed=True)
    assert (tally.wrong, tally.counts["told of the disk"]) == ([], 1)


@pytest.mark.parametrize(
    "handler",
    [
        always(500, json=error("internal_error")),
        always(504, json=error("timeout")),
        always(503, headers={"retry-after": "1"}, json=error("store_unreachable")),
        always(200, text=f"event: error\ndata: {json.dumps(error('internal_error'))}\n\n"),
        always(502, text="<html>"),
    ],
)
def test_every_other_error_of_the_service_is_blamed(handler: Handler) -> None:
    assert tally_of(handler, streamed=True, disk_failed=True).wrong


def test_a_connection_that_breaks_is_blamed() -> None:
    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("reset")

    assert "ReadError" in tally_of(broken).wrong[0]


def test_questions_are_of_every_task_mode_and_kind_and_only_background_ones_may_have_to_wait() -> None:
    asked = questions()
    kinds = {one.kind for one in asked}
    assert kinds == {*MODES, "retrieved", "chat", "constrained", "background"}
    for kind in kinds - set(MODES):
        assert sum(one.kind == kind for one in asked) >= len(TASKS)
    background = [one for one in asked if one.kind == "background"]
    assert all("expert" in one.body and "expert" not in one.in_front().body for one in background)


def test_a_talk_sends_our_own_answers_back_and_is_named_or_not() -> None:
    sent = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        expert = {"task": "sql", "reason": "session"}
        return httpx.Response(
            200, json={"choices": [{"message": {"content": f"a{len(sent)}"}}], "usage": {"expert": expert}}
        )

    with client_of(handler) as client:
        assert [said.text for said in Talk(("x", "y"), named=False).hold(client, "s")] == ["a1", "a2"]
        assert [said.text for said in Talk(("x",), named=True).hold(client, "s")] == ["a3"]
    assert [one["content"] for one in sent[1]["messages"]] == ["x", "a1", "y"]
    assert [one["expert"] for one in sent] == [{}, {}, {"session": "s"}]
    assert {one.named for one in talks()} == {True, False}


@pytest.mark.parametrize(
    ("change", "ok"),
    [
        ({}, True),
        ({"wrong": ["x"]}, False),
        ({"left": {"moepager_slots_leased": 1.0}}, False),
        ({"anonymous_late": 420 << 20}, False),
        ({"files_late": 40}, False),
        ({"threads_late": 11}, False),
    ],
)
def test_a_soak_is_well_without_wrong_answers_leftovers_and_growth(change: dict[str, Any], ok: bool) -> None:
    assert replace(GOOD, **change).ok is ok


def test_what_is_left_is_read_from_the_services_own_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.soak.DRAIN_SECONDS", 0)
    text = '# TYPE x gauge\nmoepager_queue_length{task="a"} 1.0\nmoepager_queue_length{task="b"} 2.0\n'
    with client_of(always(200, text=text + "moepager_running 0.0\nmoepager_slots_leased 4.0\n")) as client:
        left = leftovers(client)
    assert left == {"moepager_running": 0, "moepager_queue_length": 3, "moepager_slots_leased": 4}


def test_what_the_service_calls_a_failure_of_its_own_is_blamed(tmp_path: Path) -> None:
    log, tally = tmp_path / "log", Tally()
    log.write_text('{"level": "info", "message": "x"}\n{"level": "warning", "message": "y"}\n')
    errors_logged(log, tally)
    assert tally.wrong == []
    log.write_text('{"time": "t", "level": "error", "message": "request 1 failed"}\n')
    errors_logged(log, tally)
    assert "request 1 failed" in tally.wrong[0]


def test_a_disk_fails_while_its_file_says_so(tmp_path: Path) -> None:
    read = faulty(tmp_path / "disk", lambda descriptor, buffers, offset: 7)
    assert read(0, [], 0) == 7
    (tmp_path / "disk").write_text(EIO)
    with pytest.raises(OSError, match="Input/output") as failed:
        read(0, [], 0)
    assert failed.value.errno == errno.EIO
    (tmp_path / "disk").unlink()
    assert read(0, [], 0) == 7


def test_a_reference_is_what_each_was_answered_alone_and_a_refusal_is_none() -> None:
    with client_of(always(400, json=error("invalid_request"))) as client, pytest.raises(NoAnswerError, match="400"):
        Reference.taken(client, [ASKED], [])


def test_a_sample_is_of_the_process_that_it_names() -> None:
    found = sample(os.getpid())
    assert found.anonymous > 2**20
    assert found.files > 2
    assert found.threads >= 1
