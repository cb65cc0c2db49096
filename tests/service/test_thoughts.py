"""Thoughts that a model marks come back in `reasoning_content`, whole and in streams; other text is left alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from engine.text import Tokenizer
from engine.thought_form import ThoughtForm, thought_form_of
from engine.tiny import write_tiny
from engine.tool_form import ToolForm
from service.answer_reader import AnswerReader, Forms, message_of
from service.app import create_app
from service.parts import Parts, open_parts
from service.settings import Settings
from service.thought_reader import Thought, ThoughtReader

THINK = ThoughtForm("<think>", "</think>")
CALL = ToolForm("[call ", "] ", " [done]", "")
# As Qwen's: the assistant may think by itself; with `open` the prompt begins the thought, as DeepSeek-R1's.
TEMPLATE = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "[call {{ c.function.name }}] {{ c.function.arguments | tojson }} [done]{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% if open %}<think>\n{% endif %}{% endif %}"
)
LIGHT = {"type": "function", "function": {"name": "light", "parameters": {"type": "object"}}}
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "why"}], "max_tokens": 60}
OPEN = {"chat_template_kwargs": {"open": True}}


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("{% set content = content.split('</think>')[-1] %}", THINK),
        ("x [THINK]{{ m.thinking }}[/THINK] y", ThoughtForm("[THINK]", "[/THINK]")),
        ("<seed:think>{{ t }}</seed:think>", ThoughtForm("<seed:think>", "</seed:think>")),
        ("◁think▷{{ t }}◁/think▷", ThoughtForm("◁think▷", "◁/think▷")),
        ("{{ messages[0].content }}</tool_call></thinker>", None),
        ("", None),
    ],
)
def test_how_a_template_marks_thoughts_is_read_off_it(source: str, form: ThoughtForm | None) -> None:
    assert thought_form_of([source]) == form


def reference(text: str, opened: bool, ends: str) -> tuple[str, str]:
    """Thought and rest by one expression over the whole text."""
    begin = r"\s*(?:<think>)?" if opened else r"\s*<think>"
    found = re.match(rf"{begin}\s*(.*?)\s*(?:</think>\s*|(?={ends})|\Z)", text, re.DOTALL)
    return (found[1], text[found.end() :]) if found else ("", text)


WORDS = ("<think>", "</think>", "[call ", "a", "b c", " ", "\n\n", "<", "</", "think", "</thin", "[", "…")


@pytest.mark.parametrize("seed", range(8))
def test_thoughts_are_split_off_however_the_text_arrives(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(400):
        opened, trigger = rng.random() < 0.5, "[call " if rng.random() < 0.5 else None
        text = "".join(rng.choices(WORDS, k=rng.randrange(9)))
        if rng.random() < 0.5:
            text = f"{rng.choice(['', ' '])}<think>{text}</think>{rng.choice(['', chr(10), ' x'])}{text}"
        reader = ThoughtReader(THINK, opened, trigger)
        pieces, at = list[Thought | str](), 0
        while at < len(text):
            step = rng.randrange(1, 7)
            pieces += reader.push(text[at : at + step])
            at += step
        pieces += reader.flush()
        thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
        said = "".join(piece for piece in pieces if isinstance(piece, str))
        assert (thought, said) == reference(text, opened, re.escape(trigger) if trigger else r"(?!)"), (text, opened)


def test_a_thought_comes_out_while_it_is_thought() -> None:
    reader = ThoughtReader(THINK, opened=False)
    found = [reader.push(text) for text in ("<thi", "nk>\nI ", "wonder", ".\n</", "think>", "\n\n42", " it is")]
    assert found == [[], [Thought("I")], [Thought(" wonder")], [Thought(".")], [], ["42"], [" it is"]]


@pytest.mark.parametrize("text", ["plain </think> text", " leading <think>x</think>", "<b>", "", " ", "<think"])
def test_an_answer_without_a_thought_is_left_as_it_is(text: str) -> None:
    assert message_of(text, Forms(None, THINK)) == {"role": "assistant", "content": text}


def test_a_thought_and_calls_are_told_apart() -> None:
    text = "<think>call [x] it</think>\n\nSure.[call light] {} [done]"
    found = message_of(text, Forms(CALL, THINK))
    assert (found["reasoning_content"], found["content"]) == ("call [x] it", "Sure.")
    assert [call["function"]["name"] for call in found["tool_calls"]] == ["light"]
    unended = message_of("<think>I call [call light] {} [done]", Forms(CALL, THINK))
    assert (unended["reasoning_content"], unended["content"]) == ("I call", None)
    assert unended["tool_calls"][0]["function"] == {"name": "light", "arguments": "{}"}


def test_the_reader_of_a_model_that_marks_nothing_hands_text_on() -> None:
    reader = AnswerReader(Forms())
    assert [reader.push(""), reader.push("<think>"), reader.push(" x"), reader.flush()] == [[], ["<think>"], [" x"], []]


@pytest.fixture(scope="module")
def thinking_parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    folder = write_tiny("qwen3_moe", tmp_path_factory.mktemp("thinking") / "tiny", max_position_embeddings=512)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    store = f"sqlite:///{tmp_path_factory.mktemp('store') / 'store.db'}"
    settings = Settings(
        model=str(folder),
        store=store,
        embedder="hash",
        max_context=512,
        threads=1,
        threshold=0.9,
        allowed_hosts="testserver",
    )
    with open_parts(settings) as parts:
        yield parts


@pytest.fixture
def talk(thinking_parts: Parts, worker: Any) -> Iterator[Callable[[str, dict[str, Any]], list[Any]]]:
    """What `text`, said by the model, comes back as: whole, and put together from its stream."""
    app = create_app(lambda: nullcontext(replace(thinking_parts, worker=worker)))
    with TestClient(app) as client:
        while client.get("/readyz").status_code == 503:
            pass

        def say(text: str, body: dict[str, Any]) -> list[Any]:
            worker.text = text
            whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
            stream = client.post("/v1/chat/completions", json={**body, "stream": True}).text
            return [whole, joined(stream)]

        yield say


def joined(stream: str) -> dict[str, Any]:
    """The message that a stream's deltas make."""
    message: dict[str, Any] = {"content": ""}
    for line in stream.splitlines():
        if not line.startswith("data: {"):
            continue
        chunk = json.loads(line[6:])
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["role"] = delta.get("role", message.get("role"))
            message["content"] += delta.get("content") or ""
            if "reasoning_content" in delta:
                message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if len(calls) == call["index"]:
                    calls.append({"name": call["function"]["name"], "arguments": ""})
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return message


@pytest.mark.parametrize(
    ("text", "more", "thought", "said"),
    [
        ("<think>\nhm\n</think>\n\n42", {}, "hm", "42"),
        ("<think>\n\n</think>\n\n42", {}, None, "42"),
        ("hm, 6 * 7\n</think>\n\n42", OPEN, "hm, 6 * 7", "42"),
        ("<think>hm</think>42", OPEN, "hm", "42"),
        ("<think>and so on and", {}, "and so on and", ""),  # where the limit cut it
        ("and so on </thi", OPEN, "and so on </thi", ""),
        ("42, no <think>about</think> it", {}, None, "42, no <think>about</think> it"),
    ],
)
def test_messages_and_deltas_tell_thoughts_from_answers(
    talk: Callable[[str, dict[str, Any]], list[Any]], text: str, more: dict[str, Any], thought: str | None, said: str
) -> None:
    for message in talk(text, {**ASK, **more}):
        assert (message["role"], message.get("reasoning_content"), message["content"]) == ("assistant", thought, said)


def test_calls_of_tools_come_behind_a_thought(talk: Callable[[str, dict[str, Any]], list[Any]]) -> None:
    body = {**ASK, "tools": [LIGHT]}
    for message in talk('<think>dark here</think>\n\n[call light] {"a": 1} [done]', body):
        assert (message["reasoning_content"], message["content"] or "") == ("dark here", "")
        [call] = message["tool_calls"]
        assert call.get("function", call) == {"name": "light", "arguments": '{"a": 1}'}


@pytest.mark.parametrize("rule", [{"response_format": {"type": "json_object"}}, {"guided_regex": ".*"}])
def test_what_a_grammar_rules_is_the_answer_itself(
    talk: Callable[[str, dict[str, Any]], list[Any]], rule: dict[str, Any]
) -> None:
    for message in talk("{}", {**ASK, **OPEN, **rule}):
        assert (message["content"], "reasoning_content" in message) == ("{}", False)


def test_a_query_tells_the_thought_beside_the_answer(
    thinking_parts: Parts, worker: Any, events_of: Callable[[str], list[tuple[str, Any]]]
) -> None:
    worker.text = "<think>hm</think>42"
    with TestClient(create_app(lambda: nullcontext(replace(thinking_parts, worker=worker)))) as client:
        while client.get("/readyz").status_code == 503:
            pass
        whole = client.post("/v1/query", json={"query": "why"}).json()
        assert (whole["answer"], whole["reasoning"]) == ("42", "hm")
        found = events_of(client.post("/v1/query", json={"query": "why", "stream": True}).text)
    tokens = [data for event, data in found if event == "token"]
    assert "".join(data.get("reasoning", "") for data in tokens) == "hm"
    assert "".join(data.get("text", "") for data in tokens) == "42"
    done = dict(found)["done"]
    assert (done["answer"], done["reasoning"]) == ("42", "hm")


def test_a_thought_that_the_limit_cuts_keeps_every_log_probability(thinking_parts: Parts) -> None:
    """By the real engine, whose random model never ends the thought that the prompt began."""
    body = {**ASK, **OPEN, "max_tokens": 12, "logprobs": True, "ignore_eos": True, "temperature": 1.0, "seed": 3}
    with ExitStack() as stack:
        client = stack.enter_context(TestClient(create_app(lambda: nullcontext(thinking_parts))))
        while client.get("/readyz").status_code == 503:
            pass
        [whole] = client.post("/v1/chat/completions", json=body).json()["choices"]
        stream = client.post("/v1/chat/completions", json={**body, "stream": True}).text
    assert (whole["message"]["content"], whole["finish_reason"]) == ("", "length")
    assert whole["message"]["reasoning_content"]
    assert len(whole["logprobs"]["content"]) == 12
    assert joined(stream)["reasoning_content"] == whole["message"]["reasoning_content"]
    assert len(re.findall(r'"top_logprobs"', stream)) == 12


def test_earlier_thoughts_reach_a_template_that_shows_them(thinking_parts: Parts, worker: Any) -> None:
    turns = [*ASK["messages"], {"role": "assistant", "content": "so", "reasoning_content": "hm"}, *ASK["messages"]]
    with TestClient(create_app(lambda: nullcontext(replace(thinking_parts, worker=worker)))) as client:
        while client.get("/readyz").status_code == 503:
            pass
        tokens = client.post("/tokenize", json={"messages": turns}).json()["tokens"]
    assert "<assistant><think>\nhm\n</think>\n\nso" in thinking_parts.engine.tokenizer.decode(tokens)


def test_marks_that_are_special_tokens_are_no_text(tmp_path: Path) -> None:
    """`decode` leaves special tokens out, so nothing could be split at them."""
    folder = write_tiny("qwen3_moe", tmp_path / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert Tokenizer(folder).thought_form == THINK
    made = Tokenizer(folder)
    made._tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert made.thought_form is None
