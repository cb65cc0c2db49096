"""Whose conversation a request belongs to and whether anybody waits for it, by what clients really send."""

from __future__ import annotations

from typing import Any

import pytest

from service.bodies import ChatBody, CompletionBody
from service.callers import ANYBODY, Caller, chat_caller, openai_caller, text_to_retrieve
from service.passages import Passage

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


def _passage(body: ChatBody, caller: Caller = ANYBODY) -> Passage:
    found = chat_caller(caller, body)
    assert found.session is None
    assert found.passage is not None
    return found.passage


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


def test_a_chat_without_a_name_is_known_by_what_was_said_up_to_each_answer() -> None:
    first = _passage(_user("boil an egg"))
    assert first.answers == ()
    known, _ = first.answered({"content": " Yes.\n"})  # few clients send blanks back as they came
    second = _passage(_user("boil an egg", "and rice"))
    assert second.answers == (known,)
    again, _ = second.answered({"content": "Yes."})
    third = _passage(_user("boil an egg", "and rice", "thanks"))
    assert third.answers == (again, known)  # the newest first
    assert third.opening == first.opening  # all that the queue asks for


@pytest.mark.parametrize(
    ("owner", "texts", "answer"),
    [
        ("other", ("boil an egg", "and rice"), "Yes."),
        ("", ("boil two eggs", "and rice"), "Yes."),
        ("", ("boil an egg", "and rice"), "No."),
        ("", ("boil an eggassistantYes.", "and rice"), "Yes."),
    ],
)
def test_another_owner_question_or_answer_is_another_conversation(
    owner: str, texts: tuple[str, ...], answer: str
) -> None:
    known, _ = _passage(_user("boil an egg")).answered({"content": answer})
    assert known not in _passage(_user(*texts), Caller(owner)).answers


def test_the_systems_words_and_the_form_of_arguments_tell_no_conversations_apart() -> None:
    system = {"role": "system", "content": "It is 9:41."}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"b": 1, "a": 2}'}}
    asked = {"role": "user", "content": "boil an egg"}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    body = ChatBody.model_validate({"model": "m", "messages": [asked]})
    known, _ = _passage(body).answered(answer)
    call["function"]["arguments"] = '{"a":2,"b":1}'  # type: ignore[index]
    later = [system, asked, answer, {"role": "tool", "tool_call_id": "1", "content": "7 minutes"}]
    assert _passage(ChatBody.model_validate({"model": "m", "messages": later})).answers == (known,)


def test_a_clients_own_call_runs_in_the_background_about_its_conversation() -> None:
    body = _user(TITLE)
    caller = chat_caller(ANYBODY, body)
    assert caller.priority == "background"
    assert text_to_retrieve(body.messages) == "and potatoes\nwith their skin"
    turns = [
        ("user", "how long do I boil an egg"),
        ("assistant", "Seven minutes."),
        ("user", "and potatoes\nwith their skin"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    asked = ChatBody.model_validate({"model": "m", "messages": messages})
    whole, end = _passage(asked).answered({"content": "Twenty."})
    assert caller.passage is not None
    assert caller.passage.answers[0] == whole
    assert end in caller.passage.answers
    shortened = TITLE.replace("USER: how long do I boil an egg\nASSISTANT: Seven minutes.\n", "")
    about = chat_caller(ANYBODY, _user(shortened)).passage
    assert about is not None
    assert whole not in about.answers
    assert end in about.answers  # clients tell the end of a long conversation only


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
