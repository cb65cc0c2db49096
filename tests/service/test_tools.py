"""Tools: both ways of telling a model of them, calls that always parse, streams, and the reader of calls."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from engine.text import Tokenizer
from engine.tiny import write_tiny
from engine.tool_form import GENERIC, ToolForm
from service.answer_reader import Forms, message_of
from service.app import create_app
from service.parts import open_parts
from service.settings import Settings
from service.tools import Arguments, Begun, CallReader

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "how long do I boil an egg"}]
TIMER = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Rings after some minutes.",
        "parameters": {
            "type": "object",
            "properties": {"minutes": {"type": "integer", "minimum": 1, "maximum": 99}, "loud": {"type": "boolean"}},
            "required": ["minutes"],
            "additionalProperties": False,
        },
    },
}
LIGHT = {
    "type": "function",
    "function": {"name": "light", "parameters": {"type": "object", "additionalProperties": False}},
}
# A template of its own form: calls in square brackets, tools listed, results as turns of the role `tool`.
TEMPLATE = (
    "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "[call {{ c.function.name }}] {{ c.function.arguments | tojson }} [done]{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module", params=["plain", "native"])
def wide_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny("qwen3_moe", tmp_path_factory.mktemp("wide") / "tiny", max_position_embeddings=2048)
    if request.param == "native":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def api(
    wide_model: Path, tmp_path_factory: pytest.TempPathFactory, live: Callable[[Any], AbstractContextManager[str]]
) -> Iterator[str]:
    """A live service on a context wide enough for tools; exact, for nothing is profiled."""
    store = f"sqlite:///{tmp_path_factory.mktemp('store') / 'store.db'}"
    settings = Settings(
        model=str(wide_model), store=store, embedder="hash", max_context=1024, max_batch=4, threads=1, threshold=0.9
    )
    with open_parts(settings) as parts, live(create_app(lambda: nullcontext(parts))) as url:
        yield url


@pytest.fixture(scope="module")
def client(api: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "max_tokens": 120, **fields})


def checked(call: Any) -> Any:
    """The arguments of a call, which fit their tool's schema."""
    found = json.loads(call.function.arguments)
    if call.function.name == "light":
        assert found == {}
    else:
        assert call.function.name == "set_timer"
        assert set(found) <= {"minutes", "loud"}
        assert 1 <= found["minutes"] <= 99
        assert isinstance(found.get("loud", True), bool)
    return found


def test_how_a_template_writes_calls_is_read_off_it(wide_model: Path) -> None:
    form = Tokenizer(wide_model).tool_form
    native = (wide_model / "chat_template.jinja").exists()
    assert form == (ToolForm("[call ", "] ", " [done]", "") if native else None)  # templates drop a break after a block


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_required_calls_parse_and_fit_whatever_the_model_says(client: openai.OpenAI, seed: int, parallel: bool) -> None:
    answer = ask(
        client, tools=[TIMER, LIGHT], tool_choice="required", temperature=1.5, seed=seed, parallel_tool_calls=parallel
    )
    message = answer.choices[0].message
    assert message.content is None
    for call in message.tool_calls:
        checked(call)
    assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)
    assert parallel or len(message.tool_calls) == 1
    assert answer.choices[0].finish_reason in ("tool_calls", "length")
    assert parallel or answer.choices[0].finish_reason == "tool_calls"


def test_a_named_tool_is_called_once_and_ends_as_openai_says(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "light"}}
    answer = ask(client, tools=[TIMER, LIGHT], tool_choice=named, temperature=1.0, seed=1)
    [call] = answer.choices[0].message.tool_calls
    assert (call.function.name, checked(call), answer.choices[0].finish_reason) == ("light", {}, "stop")


def test_a_model_that_may_choose_says_what_it_likes_or_calls_soundly(client: openai.OpenAI) -> None:
    """Left to itself this model never calls; pushed to the mark of a call, it has to go on as one."""
    plain = ask(client, tools=[LIGHT], tool_choice="auto", temperature=1.0, seed=1, max_tokens=20)
    assert plain.choices[0].message.tool_calls is None
    assert plain.choices[0].message.content


def test_json_or_a_call_where_both_are_asked_for(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "boolean"}}}
    for seed in range(3):
        answer = ask(client, tools=[LIGHT], response_format=schema, temperature=1.5, seed=seed)
        message = answer.choices[0].message
        assert message.content in ("true", "false") if not message.tool_calls else checked(message.tool_calls[0]) == {}


def test_streamed_deltas_add_up_to_the_whole_call(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"tools": [TIMER, LIGHT], "tool_choice": "required", "temperature": 1.5, "seed": 2}
    whole = ask(client, **fields).choices[0].message.tool_calls
    calls: dict[int, list[str]] = {}
    for chunk in ask(client, stream=True, **fields):
        for delta in chunk.choices[0].delta.tool_calls or ():
            if delta.id:
                calls[delta.index] = [delta.function.name, ""]
            calls[delta.index][1] += delta.function.arguments
    assert list(calls.values()) == [[call.function.name, call.function.arguments] for call in whole]


def test_a_conversation_goes_on_with_the_results_of_calls(client: openai.OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "set_timer", "arguments": '{"minutes": 5}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rang"},
    ]
    longer = ask(client, messages=messages, tools=[TIMER], tool_choice="none")
    assert longer.usage.prompt_tokens > ask(client).usage.prompt_tokens + len("set_timer") + len("rang")
    assert longer.choices[0].message.content


def test_tokenize_counts_what_the_same_chat_reads(api: str, client: openai.OpenAI) -> None:
    """With the fields that vllm's clients send along."""
    told = {"add_special_tokens": False, "add_generation_prompt": True, "continue_final_message": False}
    for tools in ([], [TIMER], [TIMER, LIGHT]):
        body = {"messages": QUESTION, "tools": tools, "chat_template_kwargs": {"enable_thinking": False}, **told}
        found = httpx.post(f"{api}/tokenize", json=body).json()
        assert found["count"] == ask(client, tools=tools, max_tokens=1).usage.prompt_tokens
        assert found["ignored"] == ["chat_template_kwargs.enable_thinking"]
    for wrong in ({"continue_final_message": True}, {"add_generation_prompt": False}, {"temperature": 1}):
        assert httpx.post(f"{api}/tokenize", json={"messages": QUESTION, **wrong}).status_code == 400


def test_langchain_talks_streams_structures_and_calls(api: str) -> None:
    model = ChatOpenAI(base_url=f"{api}/v1", api_key=SecretStr("none"), model="tiny", max_retries=0, stream_usage=True)
    answer = model.invoke("how long do I boil an egg", max_tokens=12)
    assert isinstance(answer, AIMessage)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 12
    chunks = list(model.stream("how long do I boil an egg", max_tokens=12))
    assert "".join(str(chunk.content) for chunk in chunks) == answer.content
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [12]

    class Egg(BaseModel):
        soft: bool
        size: int

    found = model.with_structured_output(Egg, method="function_calling").invoke("an egg", max_tokens=300)
    assert isinstance(found, Egg)

    @tool
    def set_timer(loud: bool) -> str:
        """Rings."""
        return f"rang {loud}"

    bound = model.bind_tools([set_timer], tool_choice="any", parallel_tool_calls=False)
    called = bound.invoke("set it", max_tokens=120)
    assert isinstance(called, AIMessage)
    [call] = called.tool_calls
    assert (call["name"], type(call["args"]["loud"])) == ("set_timer", bool)
    done = ToolMessage(set_timer.invoke(call["args"]), tool_call_id=call["id"])
    assert model.invoke([HumanMessage("set it"), called, done], max_tokens=5).usage_metadata


def test_langchain_reads_a_json_schema_answer(api: str) -> None:
    class Doneness(BaseModel):
        soft: bool

    model = ChatOpenAI(base_url=f"{api}/v1", api_key=SecretStr("none"), model="tiny", max_retries=0, max_tokens=60)  # type: ignore[call-arg]
    assert isinstance(model.with_structured_output(Doneness, method="json_schema").invoke("an egg"), Doneness)


FORMS = (GENERIC, ToolForm("[call ", "] ", " [done]", "\n"), ToolForm('{"name": "', '", "parameters": ', "}", " "))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(20))
def test_calls_are_read_the_same_however_the_text_is_cut(form: ToolForm, seed: int) -> None:
    rng = random.Random(seed)
    said = rng.choice(["", "Let me see. ", "<tool? [cal {", 'quote "x" '])
    wanted = [(f"f{n}", {"k": rng.choice(['}"\\', "[{", "é\n", 1, [[]]]), "n": {}}) for n in range(rng.randint(0, 3))]
    calls = form.between.join(form.write(name, json.dumps(arguments)) for name, arguments in wanted)
    text = said + calls
    reader, pieces, at = CallReader(form), list[Any](), 0
    while at < len(text):
        step = rng.randint(1, 6)
        pieces += reader.push(text[at : at + step])
        at += step
    pieces += reader.flush()
    assert "".join(piece for piece in pieces if isinstance(piece, str)).strip() == said.strip()
    assert [piece.name for piece in pieces if isinstance(piece, Begun)] == [name for name, _ in wanted]
    for place, (_, arguments) in enumerate(wanted):
        written = "".join(p.text for p in pieces if isinstance(p, Arguments) and p.index == place)
        assert json.loads(written) == arguments
    message = message_of(text, Forms(form))
    found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", [])]
    assert found == wanted


def test_an_unfinished_call_shows_what_there_is() -> None:
    message = message_of('<tool_call>\n{"name": "f", "arguments": {"a": 1', Forms(GENERIC))
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1'}
    assert message_of("<tool_", Forms(GENERIC)) == {"role": "assistant", "content": "<tool_"}
