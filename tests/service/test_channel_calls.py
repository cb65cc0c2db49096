"""gpt-oss's calls of tools, in harmony's channels: their grammar, reading them back, streams, a conversation's turns.

The texts are in the form of https://github.com/openai/harmony; no gpt-oss was at hand.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer as RawTokenizer

from engine.constraints import Constraint
from engine.harmony import MARKS, SIGNS, spelt
from engine.text import Tokenizer
from engine.tiny import write_tiny
from engine.tool_form import GENERIC
from service.answer_reader import AnswerReader, Forms, message_of
from service.app import create_app
from service.bodies import ChatBody
from service.constrain import compiled
from service.parts import Parts, open_parts
from service.settings import Settings
from service.thought_reader import Thought
from service.tools import IN_CHANNELS, Arguments, Begun, form_for, with_tools

# As gpt-oss's own: of several calls in one message it writes the first, it wants descriptions, and not both of content
# and thinking.
TEMPLATE = (
    "{% if tools %}<|start|>developer<|message|>functions: "
    "{% for t in tools %}{{ '// ' + t.function.description + '\n' }}type {{ t.function.name }}{% endfor %}<|end|>"
    "{% endif %}{% set last = namespace(name='nobody') %}{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.content and m.thinking %}{{ raise_exception('both') }}{% endif %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% set c = m.tool_calls[0].function %}{% set last.name = c.name %}"
    "<|start|>assistant to=functions.{{ c.name }}<|channel|>commentary json<|message|>"
    "{{ c.arguments | tojson }}<|call|>"
    "{% elif m.role == 'tool' %}"
    "<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
CALL = "<|call|>"
QUESTION = [{"role": "user", "content": "how long do I boil an egg"}]
TIMER = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "parameters": {
            "type": "object",
            "properties": {"minutes": {"type": "integer", "minimum": 1, "maximum": 99}, "label": {"type": "string"}},
            "required": ["minutes"],
            "additionalProperties": False,
        },
    },
}
LIGHT = {"type": "function", "function": {"name": "light"}}
NOTE = "<|channel|>analysis<|message|>I need the timer.<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>I set it.<|end|><|start|>assistant"
BEHIND = '<|channel|>commentary to=functions.set_timer <|constrain|>json<|message|>{"minutes":5}'
BEFORE = ' to=functions.set_timer<|channel|>commentary json<|message|>{"minutes":5}'
FINAL = "<|channel|>final<|message|>Five minutes."


def signed(text: str) -> str:
    """As it is decoded from special tokens."""
    for mark, sign in SIGNS.items():
        text = text.replace(mark, sign)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose tokenizer has the marks as special tokens, and ends at `<|call|>`, too."""
    made = write_tiny(
        "qwen3_moe", tmp_path_factory.mktemp("calls") / "tiny", vocab_size=272, max_position_embeddings=2048
    )
    raw = RawTokenizer.from_file(str(made / "tokenizer.json"))
    raw.add_special_tokens([*MARKS, CALL])
    raw.save(str(made / "tokenizer.json"))
    (made / "chat_template.jinja").write_text(TEMPLATE)
    ends = {"eos_token_id": [258, raw.token_to_id(CALL)]}
    (made / "generation_config.json").write_text(json.dumps(ends))
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def parts(folder: Path) -> Iterator[Parts]:
    store = f"sqlite:///{folder.parent / 'store.db'}"
    with open_parts(Settings(model=str(folder), store=store, embedder="hash", threads=1, max_context=1024)) as opened:
        yield opened


@pytest.fixture(scope="module")
def api(parts: Parts, live: Callable[[Any], AbstractContextManager[str]]) -> Iterator[str]:
    with live(create_app(lambda: nullcontext(parts))) as url:
        yield url


@pytest.fixture(scope="module")
def client(api: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "max_tokens": 160, **fields})


def body(**fields: Any) -> ChatBody:
    return ChatBody.model_validate({"model": "tiny", "messages": QUESTION, "tools": [TIMER, LIGHT], **fields})


def constraint_of(tokenizer: Tokenizer, **fields: Any) -> Constraint:
    wanted = with_tools(body(**fields), None, IN_CHANNELS)
    assert wanted is not None
    return compiled(wanted, tokenizer)


def follows(tokenizer: Tokenizer, constraint: Constraint, text: str) -> bool:
    """Whether the answer may be this text, and end there."""
    matching = constraint.begin(10_000)
    for token in tokenizer.encode(text, special_tokens=False):
        if not matching.allowed()[token]:
            return False
        matching.take(token)
    return bool(all(matching.allowed()[end] for end in tokenizer.eos))


def test_only_a_template_that_leaves_the_channel_open_has_calls_in_channels(folder: Path, tmp_path: Path) -> None:
    """Some copies open the final channel, in which no call can be made: they are told of tools in plain words."""
    assert Tokenizer(folder).calls_in_channels
    for other in (TEMPLATE.replace("<|start|>assistant{% endif %}", "<|start|>assistant<|channel|>final{% endif %}"),
                  TEMPLATE.replace("if tools", "if false").replace("in tools", "in []")):  # fmt: skip
        changed = shutil.copytree(folder, tmp_path / str(len(other)))
        (changed / "chat_template.jinja").write_text(other)
        found = Tokenizer(changed)
        assert (found.has_channels, form_for(found)) == (True, GENERIC)


@pytest.mark.parametrize("text", [FINAL, NOTE + FINAL, NOTE + PREAMBLE + NOTE + FINAL])
def test_a_model_that_may_choose_says_what_it_likes(tokenizer: Tokenizer, text: str) -> None:
    assert follows(tokenizer, constraint_of(tokenizer), text)
    assert not follows(tokenizer, constraint_of(tokenizer, tool_choice="required"), text)


@pytest.mark.parametrize("call", [BEHIND, BEFORE, BEHIND.replace(" <|constrain|>", "<|constrain|>")])
def test_a_call_may_have_its_recipient_in_either_place(tokenizer: Tokenizer, call: str) -> None:
    """As the format's pages have it; with and without the blank before the kind of its text."""
    for before in ("", NOTE, NOTE + PREAMBLE):
        assert follows(tokenizer, constraint_of(tokenizer), before + call)
    assert follows(tokenizer, constraint_of(tokenizer, tool_choice="required"), call)
    named = {"type": "function", "function": {"name": "light"}}
    assert not follows(tokenizer, constraint_of(tokenizer, tool_choice=named), call)


@pytest.mark.parametrize(
    "text",
    [
        BEHIND.replace("set_timer", "set_alarm"),
        BEHIND.replace("5", "500"),
        BEHIND.replace("functions.set_timer", "python"),
        BEHIND + "<|end|><|start|>assistant" + BEHIND,  # a call ends the answer
        "plain text in no channel",
    ],
)
def test_what_would_be_no_sound_call_can_not_be_written(tokenizer: Tokenizer, text: str) -> None:
    assert not follows(tokenizer, constraint_of(tokenizer), text)


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_taken_apart_however_the_text_arrives(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        thoughts, said, text = list[str](), list[str](), ""
        for _ in range(rng.randrange(4)):
            channel, written = rng.choice([("analysis", thoughts), ("commentary", said)])
            written.append(rng.choice(["hm", "a\nb", "to=functions.f", "<|end|>", '{"a": 1}']))
            head, tail = signed(f"<|channel|>{channel}<|message|>"), signed("<|end|><|start|>assistant")
            text += head + written[-1] + tail
        arguments = json.dumps({"k": rng.choice(['}"\\', "<|end|>", "<|channel|>", 1, [[{}]]]), "n": {}})
        name = rng.choice(["f", "get-it.now"])
        call = signed(rng.choice([BEHIND, BEFORE]))
        text += call.replace("set_timer", name).replace('{"minutes":5}', arguments)
        assert read(text, rng) == ("\n\n".join(thoughts), "\n\n".join(said), [(name, arguments)]), text


def read(text: str, rng: random.Random) -> tuple[str, str, list[tuple[str, str]]]:
    """Thought, text and calls, by pieces of any length."""
    reader, pieces, at = AnswerReader(Forms(IN_CHANNELS, channels=True)), list[Any](), 0
    while at < len(text):
        step = rng.randrange(1, 9)
        pieces += reader.push(text[at : at + step])
        at += step
    pieces += reader.flush()
    begun = [piece for piece in pieces if isinstance(piece, Begun)]
    assert reader.calls == len(begun)
    written = [(p.index, p.text) for p in pieces if isinstance(p, Arguments)]
    calls = [(one.name, "".join(text for index, text in written if index == one.index)) for one in begun]
    thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
    return thought, "".join(piece for piece in pieces if isinstance(piece, str)), calls


def test_a_call_that_the_limit_cut_shows_what_there_is() -> None:
    message = message_of(signed(NOTE + BEHIND[:-2]), Forms(IN_CHANNELS, channels=True))
    assert message["reasoning_content"] == "I need the timer."
    assert message["tool_calls"][0]["function"] == {"name": "set_timer", "arguments": '{"minutes":'}
    assert "tool_calls" not in message_of(signed(BEHIND.partition("<|message|>")[0]), Forms(IN_CHANNELS, channels=True))


def test_without_tools_a_call_is_a_thought() -> None:
    assert message_of(signed(BEHIND), Forms(channels=True)) == {
        "role": "assistant", "content": "", "reasoning_content": '{"minutes":5}',
    }  # fmt: skip


@pytest.mark.parametrize("limit", [90, 160])
@pytest.mark.parametrize("seed", range(3))
def test_required_calls_parse_and_fit_whatever_the_model_says(client: openai.OpenAI, seed: int, limit: int) -> None:
    fields: dict[str, Any] = {
        "tools": [TIMER], "tool_choice": "required", "temperature": 1.5, "seed": seed, "max_tokens": limit,
    }  # fmt: skip
    whole = ask(client, **fields).choices[0]
    assert whole.message.content is None
    [call] = whole.message.tool_calls
    assert 1 <= json.loads(call.function.arguments)["minutes"] <= 99
    names, arguments, reasons = list[str](), "", list[str]()
    for chunk in ask(client, stream=True, **fields):
        reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
        for delta in chunk.choices[0].delta.tool_calls or ():
            names += [delta.function.name] if delta.function.name else []
            arguments += delta.function.arguments
    assert (names, arguments) == ([call.function.name], call.function.arguments)
    assert reasons == [whole.finish_reason]
    assert whole.finish_reason in ("tool_calls", "length")


def test_a_call_of_the_models_own_choice_comes_back_as_one(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """The real engine, pushed towards the channel and then towards its recipient."""
    [mark] = tokenizer.encode("<|channel|>", special_tokens=False)
    towards = {str(mark): 100, str(ord("c")): 60, str(ord(" ")): 80}
    answer = ask(client, tools=[LIGHT], logit_bias=towards).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    [call] = answer.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("light", {})


@pytest.mark.parametrize("stream", [False, True])
def test_thought_preamble_and_call_come_back_apart(
    parts: Parts, worker: Any, live: Callable[[Any], AbstractContextManager[str]], stream: bool
) -> None:
    worker.text = signed(NOTE + PREAMBLE + BEHIND)
    app = create_app(lambda: nullcontext(replace(parts, worker=worker)))
    with live(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = ask(client, tools=[TIMER], stream=stream)
        found = joined(answer) if stream else whole(answer)
    assert found == ("I need the timer.", "I set it.", [("set_timer", '{"minutes":5}')], "tool_calls")


def whole(answer: Any) -> tuple[str, str, list[tuple[str, str]], str]:
    message = answer.choices[0].message
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
    return message.reasoning_content, message.content, calls, answer.choices[0].finish_reason


def joined(chunks: Any) -> tuple[str, str, list[tuple[str, str]], str]:
    thought, said, calls, reason = "", "", list[tuple[str, str]](), ""
    for chunk in chunks:
        delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason or reason
        thought += getattr(delta, "reasoning_content", None) or ""
        said += delta.content or ""
        for call in delta.tool_calls or ():
            if call.id:
                calls.append((call.function.name, ""))
            name, arguments = calls[call.index]
            calls[call.index] = (name, arguments + call.function.arguments)
    return thought, said, calls, reason


def test_the_conversation_goes_on_with_a_call_at_a_time_and_its_result_behind_it(
    api: str, tokenizer: Tokenizer
) -> None:
    calls = [_called("a", "set_timer", {"minutes": 5}), _called("b", "light", {})]
    messages: list[dict[str, Any]] = [
        *QUESTION,
        {"role": "assistant", "content": "I set it.", "reasoning_content": "Both.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "on"},
        {"role": "tool", "tool_call_id": "a", "content": "set"},
        {"role": "assistant", "content": "Done.", "reasoning_content": "Fine."},
        {"role": "user", "content": "and now"},
        {"role": "assistant", "content": None, "tool_calls": [_called("a", "light", {})]},
        {"role": "tool", "tool_call_id": "a", "content": "off"},
    ]
    read = shown(api, tokenizer, messages)
    assert read == (
        "<|start|>developer<|message|>functions: // \ntype set_timer// \ntype light<|end|>"
        "<|start|>user<|message|>how long do I boil an egg<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Both.\n\nI set it.<|end|>"
        '<|start|>assistant to=functions.set_timer<|channel|>commentary json<|message|>{"minutes": 5}'
        '<|start|>functions.set_timer to=assistant<|channel|>commentary<|message|>"set"<|end|>'
        "<|start|>assistant to=functions.light<|channel|>commentary json<|message|>{}"
        '<|start|>functions.light to=assistant<|channel|>commentary<|message|>"on"<|end|>'
        "<|start|>assistant<|channel|>final<|message|>Done.<|end|>"
        "<|start|>user<|message|>and now<|end|>"
        "<|start|>assistant to=functions.light<|channel|>commentary json<|message|>{}"
        '<|start|>functions.light to=assistant<|channel|>commentary<|message|>"off"<|end|>'
        "<|start|>assistant"
    )


def _called(name: str, function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": function, "arguments": json.dumps(arguments)}}


def shown(api: str, tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> str:
    """What the model reads of a chat, `<|call|>` left out."""
    found = httpx.post(f"{api}/tokenize", json={"messages": messages, "tools": [TIMER, LIGHT]}).json()
    return spelt(tokenizer.decode(found["tokens"], channels=True))
