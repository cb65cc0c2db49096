"""From what a client wrote to the engine's tokens, and the text that retrieval reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.card import ModelCard
from engine.text import Tokenizer
from engine.tool_form import GENERIC
from service.channel_calls import described, one_call_each
from service.messages import Message, TemplateFields, Tool, ToolCall
from service.parts import Parts
from service.tools import instructions
from store.errors import InvalidInput

ALWAYS_READ = 2**16  # characters that are turned into tokens whatever the context holds
OURS = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"})


def refuse_hopeless(length: int, field: str, parts: Parts) -> None:
    """Raises InvalidInput for more characters than the context could hold if every token were the longest one: such a
    text is refused before it takes seconds to be turned into tokens."""
    most = max(ALWAYS_READ, parts.max_context * parts.engine.tokenizer.longest)
    if length > most:
        raise InvalidInput(
            f"`{field}` has {length} characters; the context holds {parts.max_context} tokens, which are {most} "
            "characters at the very most. Shorten the text, or serve with a larger max_context.",
            param=field,
            code="context_length_exceeded",
        )


def encode_query(query: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """As one user message where the model has a chat template, else as plain text."""
    if tokenizer.has_chat_template:
        return tokenizer.encode_chat([{"role": "user", "content": query}])
    return tokenizer.encode(query)


def encode_chat(
    messages: Sequence[Message], body: TemplateFields, tokenizer: Tokenizer
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The tokens of a conversation, and the names of fields about the template that this template does not read."""
    options = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
    readable = (tokenizer.template_variables if options else frozenset()) - OURS
    known = {name: value for name, value in options.items() if name in readable}
    unread = ("reasoning_effort" if body.reasoning_effort is not None and name == "reasoning_effort" else
              f"chat_template_kwargs.{name}" for name in options if name not in readable)  # fmt: skip
    return encode_messages(messages, tokenizer, body.offered, known), tuple(unread)


def encode_messages(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    tools: Sequence[Tool] = (),
    options: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """By the model's chat template; where that knows no tools, tools and their calls are told in plain words."""
    if not tools and not any(message.role == "tool" or message.tool_calls for message in messages):
        return tokenizer.encode_chat([_turn(message) for message in messages], options=options)
    specs, turns = [tool.spec() for tool in tools], [_turn_with_calls(message) for message in messages]
    if tokenizer.calls_in_channels:
        return tokenizer.encode_chat(one_call_each(turns), [described(spec) for spec in specs], options)
    if tokenizer.tool_form is None:
        return tokenizer.encode_chat(_in_words(messages, tools), options=options)
    return tokenizer.encode_chat(turns, specs, options)


def encode_prompt(
    prompt: str | Sequence[int], tokenizer: Tokenizer, card: ModelCard, field: str = "prompt"
) -> tuple[tuple[int, ...], str]:
    """The tokens of a completion's prompt, and its text. `field` is what the client calls it."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt), prompt
    if not all(0 <= token < card.vocab for token in prompt):
        raise InvalidInput(
            f"Token ids of this model are 0 to {card.vocab - 1}; `{field}` has {min(prompt)} to {max(prompt)}.",
            param=field,
        )
    return tuple(prompt), tokenizer.decode(prompt)


def _turn(message: Message) -> dict[str, Any]:
    """OpenAI's `developer` is the `system` of the templates. What an assistant thought goes along, where its template
    shows it again."""
    turn = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    thought = (message.model_extra or {}).get("reasoning_content")
    return {**turn, "reasoning_content": thought} if message.role == "assistant" and isinstance(thought, str) else turn


def _turn_with_calls(message: Message) -> dict[str, Any]:
    turn = _turn(message)
    if message.role == "tool":
        name = {"name": message.model_extra["name"]} if message.model_extra and "name" in message.model_extra else {}
        return {**turn, "tool_call_id": message.tool_call_id, **name}
    if message.tool_calls:
        turn["tool_calls"] = [{"id": c.id, "type": "function", "function": _function(c)} for c in message.tool_calls]
    return turn


def _function(call: ToolCall) -> dict[str, Any]:
    """Templates want the arguments as an object."""
    try:
        return {"name": call.function.name, "arguments": json.loads(call.function.arguments or "{}")}
    except ValueError as error:
        raise InvalidInput(f"The arguments of a tool call are no JSON: {error}.", param="messages") from None


def _in_words(messages: Sequence[Message], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as a part of the system's message, calls as what the assistant said, results as what the user says."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": instructions(tools)}] if tools else []
    for message in messages:
        turn = _turn(message)
        if message.role == "tool":
            turn = {"role": "user", "content": f"<tool_response>\n{message.text}\n</tool_response>"}
        calls = [GENERIC.write(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
        turn["content"] += GENERIC.between.join(calls)
        if turns and turns[-1]["role"] == turn["role"] != "assistant":
            turns[-1]["content"] += "\n" + turn["content"]  # templates want roles to alternate
        else:
            turns.append(turn)
    return turns
