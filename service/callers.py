"""Who asks, as far as it matters to others: which conversation a request belongs to, and whether anybody waits for it.

A client says so in `expert.session` and `expert.priority`. What chat clients send anyway is read as well: labels and
headers that name the conversation, and the calls that they make on their own (titles, tags, follow-ups), which are
recognised by the form of their prompts and run in the background. Knows no task and no engine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request

from engine.requests import Priority
from service.bodies import ChatBody, OpenAIBody
from service.messages import Message
from service.passages import Passage, Turn, turn_of
from service.schemas import ExpertOptions
from store.records import ApiKey

HEADERS = ("x-session-id", "x-openwebui-chat-id")
LABELS = ("session_id", "conversation_id", "chat_id")  # in `metadata`
CHORE = "### Task:"  # how Open WebUI and clients after its model begin such a prompt
HISTORY = re.compile(r"<chat_history>\s*(.*?)\s*</chat_history>", re.DOTALL)
SPEAKER = re.compile(r"^(USER|ASSISTANT|SYSTEM|TOOL): ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Caller:
    """`session` names the conversation of an `owner` (the id of an API key). A chat that nothing names has a `passage`
    in its place.
    """

    owner: str = ""
    session: str | None = None
    priority: Priority = "normal"
    passage: Passage | None = field(default=None, compare=False)

    @property
    def conversation(self) -> str | None:
        """What the engine's queue knows it by: only who comes first hangs on it, so a likely name will do."""
        return self.passage.opening if self.passage else self.session

    def named(self, session: str) -> Caller:
        """In the conversation that this owner calls so: another owner's of the same name is another one."""
        name = hashlib.sha256(f"{self.owner}\0{session}".encode()).hexdigest()
        return replace(self, session=name)

    def saying(self, options: ExpertOptions | None) -> Caller:
        said = options or ExpertOptions()
        caller = self.named(said.session) if said.session else self
        return replace(caller, priority=said.priority or self.priority)


ANYBODY = Caller()


def caller_of(request: Request) -> Caller:
    """What the headers say."""
    key: ApiKey | None = request.scope.get("api_key")
    caller = Caller(key.id if key else "")
    session = next((request.headers[name] for name in HEADERS if request.headers.get(name)), None)
    return caller.named(session) if session else caller


def openai_caller(caller: Caller, body: OpenAIBody) -> Caller:
    """With what OpenAI's fields say about it: `prompt_cache_key` and `metadata`, which go before headers."""
    extra: Mapping[str, Any] = body.model_extra or {}
    metadata = extra.get("metadata")
    labels = [extra.get("prompt_cache_key")]
    labels += [metadata.get(name) for name in LABELS] if isinstance(metadata, Mapping) else []
    named = next((label for label in labels if isinstance(label, str) and label), None)
    return (caller.named(named) if named else caller).saying(body.expert)


def chat_caller(caller: Caller, body: ChatBody) -> Caller:
    """Without a name a conversation is known by what was said in it, which clients send again with every turn."""
    history = chore_history(body.messages)
    if history is not None:
        caller = replace(caller, priority="background")
    found = openai_caller(caller, body)
    if found.session is not None:
        return found
    said = [turn_of(message) for message in body.messages] if history is None else retold(history)
    return replace(found, passage=Passage.of(found.owner, said, retold=history is not None))


def chore_history(messages: Sequence[Message]) -> str | None:
    """The conversation that a client's own call is about; None where it is no such call."""
    text = messages[-1].text if messages[-1].role == "user" else ""
    found = HISTORY.search(text) if text.lstrip().startswith(CHORE) else None
    return found.group(1) if found else None


def retold(history: str) -> list[Turn]:
    """What was said, turn by turn, in a history written as `USER: ...` and `ASSISTANT: ...`."""
    _, *parts = SPEAKER.split(history)
    return [Turn(who.lower(), text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]


def text_to_retrieve(messages: Sequence[Message]) -> str | None:
    """The last words of the user; in a client's own call those of the conversation that it is about."""
    history = chore_history(messages)
    if history is not None:
        return ([turn.text for turn in retold(history) if turn.role == "user"] or [history])[-1]
    return next((message.text for message in reversed(messages) if message.role == "user"), None)
