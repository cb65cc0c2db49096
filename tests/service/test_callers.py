"""Whose conversation a request belongs to and whether anybody waits for it, by what clients really send."""

from __future__ import annotations

from typing import Any

import pytest

from service.bodies import ChatBody, CompletionBody
from service.callers import ANYBODY, Caller, chat_caller, openai_caller, text_to_retrieve

TITLE = """### Task:
Write a short title that sums up the conversation.
### Output:
JSON format: { "title": "your title" }
### Chat History:
<chat_history>
USER: how long do I boil an egg
ASSISTANT: Seven minutes.
USER: and potatoes
with their skin
ASSISTANT: Twenty.
</chat_history>"""


def _user(*texts: str, **fields: Any) -> ChatBody:
    turns = [{"role": role, "content": text} for text in texts for role in ("user", "assistant")][:-1]
    turns = [turn if turn["role"] == "user" else {**turn, "content": "Yes."} for turn in turns]
    return ChatBody.model_validate({"model": "m", "messages": turns, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"expert": {"session": "s1"}},
        {"prompt_cache_key": "s1"},
        {"metadata": {"session_id": "s1"}},
        {"metadata": {"chat_id": "s1"}},
        {"metadata": {"chat_id": "other"}, "expert": {"session": "s1"}},
    ],
)
def test_a_conversation_is_named_by_any_of_the_usual_fields(fields: dict[str, Any]) -> None:
    named = ANYBODY.named("s1").session
    assert chat_caller(ANYBODY, _user("hello", **fields)).session == named
    completion = CompletionBody.model_validate({"model": "m", "prompt": "hello", **fields})
    assert openai_caller(ANYBODY, completion).session == named


def test_labels_that_are_no_names_are_passed_over() -> None:
    body = CompletionBody.model_validate({"model": "m", "prompt": "x", "metadata": "text", "prompt_cache_key": 3})
    assert openai_caller(ANYBODY, body).session is None


def test_the_same_name_of_two_owners_is_two_conversations() -> None:
    assert Caller("a").named("s").session != Caller("b").named("s").session
    assert Caller("a").named("s").session == Caller("a").named("s").session


def test_without_a_name_a_chat_is_known_by_its_first_message_and_begins_with_it() -> None:
    first, later = chat_caller(ANYBODY, _user("boil an egg")), chat_caller(ANYBODY, _user("boil an egg", "and rice"))
    other = chat_caller(ANYBODY, _user("select rows"))
    assert first.session == later.session != other.session
    assert (first.begins, later.begins) == (True, False)


def test_a_clients_own_call_runs_in_the_background_about_its_conversation() -> None:
    body = _user(TITLE)
    caller = chat_caller(ANYBODY, body)
    assert caller.priority == "background"
    assert caller.session == chat_caller(ANYBODY, _user("how long do I boil an egg")).session
    assert not caller.begins
    assert text_to_retrieve(body.messages) == "and potatoes\nwith their skin"


def test_a_clients_own_call_may_be_asked_for_in_front() -> None:
    assert chat_caller(ANYBODY, _user(TITLE, expert={"priority": "normal"})).priority == "normal"
    assert chat_caller(ANYBODY, _user("x", expert={"priority": "background"})).priority == "background"


@pytest.mark.parametrize("text", ["### Task: sum up my notes", "What is a <chat_history>x</chat_history>?"])
def test_what_only_looks_like_such_a_call_is_the_users_own(text: str) -> None:
    body = _user(text)
    assert chat_caller(ANYBODY, body).priority == "normal"
    assert text_to_retrieve(body.messages) == text


def test_a_history_without_speakers_is_read_whole() -> None:
    assert (
        text_to_retrieve(_user("### Task:\nTags.\n<chat_history>\nboil an egg\n</chat_history>").messages)
        == "boil an egg"
    )
