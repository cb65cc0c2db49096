"""What a soak asks, and what it was answered when nobody else asked: the reference of every answer in the rush."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx

from demo.corpus import read_pairs
from demo.tasks.registry import TASKS
from service.model import BUNDLED

QUERY, CHAT = "/v1/query", "/v1/chat/completions"
MODES = ("mask", "exact", "auto")
EACH = 3  # questions of each task that name it
TOKENS, FEW = 24, 8
VAGUE = "And again, please?"  # near to no task: the conversation's own goes on
SCHEMA = {
    "type": "object",
    "properties": {"said": {"type": "string", "maxLength": 8}, "sure": {"type": "boolean"}},
    "required": ["said", "sure"],
    "additionalProperties": False,
}


class Said(NamedTuple):
    """An answer, and what it says that it was served from."""

    text: str
    task: str | None
    reason: str


class NoAnswerError(Exception):
    """An answer that is none: the HTTP status, 200 in the middle of a stream, the error's code and message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code = status, code


@dataclass(frozen=True, eq=False, slots=True)
class Question:
    """`kind` is for people, and counted."""

    kind: str
    route: str
    body: Mapping[str, Any]

    def ask(self, client: httpx.Client, stream: bool = False) -> Said:
        """Raises NoAnswerError where no answer came."""
        if not stream:
            return whole(client.post(self.route, json={**self.body}))
        with client.stream("POST", self.route, json={**self.body, "stream": True}) as reply:
            reply.read()
        return streamed(reply)

    def in_front(self) -> Question:
        """The same question of somebody who waits for it."""
        return Question(self.kind, self.route, {name: said for name, said in self.body.items() if name != "expert"})


@dataclass(frozen=True, eq=False, slots=True)
class Talk:
    """A conversation: what its user says, turn by turn. One that is not `named` is known by its content alone."""

    turns: tuple[str, ...]
    named: bool

    def hold(self, client: httpx.Client, session: str, stream: bool = False) -> Iterator[Said]:
        messages: list[dict[str, str]] = []
        expert = {"session": session} if self.named else {}
        for text in self.turns:
            messages.append({"role": "user", "content": text})
            body = {"model": BUNDLED, "messages": list(messages), "max_tokens": FEW, "expert": expert}
            said = Question("talk", CHAT, body).ask(client, stream)
            messages.append({"role": "assistant", "content": said.text})
            yield said


def questions() -> list[Question]:
    """Of every task: named in every mode, retrieved, in a chat, bound to a schema, and in the background."""
    return [question for place, task in enumerate(TASKS) for question in _of(task.name, place)]


def _of(task: str, place: int) -> Iterator[Question]:
    texts = [pair.prompt for pair in read_pairs(task, "test")]
    for number, text in enumerate(texts[:EACH]):
        mode = MODES[(place + number) % len(MODES)]
        yield Question(mode, QUERY, {"query": text, "task": task, "mode": mode, "max_tokens": TOKENS})
    yield Question("retrieved", QUERY, {"query": texts[EACH], "max_tokens": TOKENS})
    yield Question("retrieved", QUERY, {"query": texts[EACH + 1], "mode": "auto", "max_tokens": TOKENS})
    yield Question("chat", CHAT, _chat(BUNDLED, texts[EACH + 2]))
    bound = {"response_format": {"type": "json_schema", "json_schema": {"name": "said", "schema": SCHEMA}}}
    yield Question("constrained", CHAT, _chat(f"{BUNDLED}:{task}", texts[EACH + 3]) | bound)
    later = {"expert": {"priority": "background"}}
    yield Question("background", CHAT, _chat(f"{BUNDLED}:{task}", texts[EACH + 4]) | later)


def _chat(model: str, text: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": TOKENS}


def talks() -> list[Talk]:
    """Two of every task, of short texts: three turns have to fit the context. Both begin alike."""
    found = []
    for task in TASKS:
        first, last = sorted((pair.prompt for pair in read_pairs(task.name, "test")), key=len)[:2]
        found += [Talk((first, VAGUE, last), named) for named in (True, False)]
    return found


def whole(reply: httpx.Response) -> Said:
    if reply.status_code != 200:
        raise _failed(reply)
    body = reply.json()
    if "answer" in body:
        return Said(body["answer"], body["task"], body["receipt"]["reason"])
    receipt = body["usage"]["expert"]
    return Said(body["choices"][0]["message"]["content"], receipt["task"], receipt["reason"])


def streamed(reply: httpx.Response) -> Said:
    if reply.status_code != 200:
        raise _failed(reply)
    bodies = frames(reply.text)
    for body in bodies:
        if "error" in body:
            raise NoAnswerError(200, body["error"]["code"], body["error"]["message"])
    if bodies and "answer" in bodies[-1]:
        return Said(bodies[-1]["answer"], bodies[-1]["task"], bodies[-1]["receipt"]["reason"])
    receipts = [body["expert"] for body in bodies if "expert" in body]
    if not receipts or not reply.text.endswith("data: [DONE]\n\n"):
        raise NoAnswerError(200, "torn", f"the stream has no end: {reply.text[-200:]!r}")
    pieces = [choice["delta"].get("content") or "" for body in bodies for choice in body["choices"]]
    return Said("".join(pieces), receipts[-1]["task"], receipts[-1]["reason"])


def frames(text: str) -> Sequence[dict[str, Any]]:
    """The JSON of a stream's frames; comments and the last word are none."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def _failed(reply: httpx.Response) -> NoAnswerError:
    try:
        error = reply.json()["error"]
    except (ValueError, KeyError, TypeError):
        return NoAnswerError(reply.status_code, "unreadable", reply.text[:200])
    code = str(error["code"])
    if reply.status_code in (429, 503) and "retry-after" not in reply.headers:
        code = f"{code} without Retry-After"
    return NoAnswerError(reply.status_code, code, str(error["message"]))
