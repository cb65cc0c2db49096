"""Tools: what the model is told of them, the grammar of its calls, and calls read back from its text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from engine.constraints import ONE_LINE, lark_grammar
from engine.text import Tokenizer
from engine.tool_form import GENERIC, ToolForm
from service.bodies import ChatBody
from service.channel_calls import channel_rules
from service.constrain import Schema, Wanted
from service.ids import fresh_id
from service.json_end import JsonEnd
from service.messages import NamedTool, Tool
from store.errors import InvalidInput

MOST_CALLS = 16  # in one answer

IN_CHANNELS: Final = "channels"
CallForm = ToolForm | Literal["channels"]

INSTRUCTIONS = (
    "You can call functions. These are their names, purposes and parameters, one in a line:\n{tools}\n"
    "To call one, write this and nothing after it, with the arguments as a JSON object:\n{example}"
)


def form_for(tokenizer: Tokenizer) -> CallForm:
    """The chat template's own, or the one that `instructions` tell the model."""
    return IN_CHANNELS if tokenizer.calls_in_channels else tokenizer.tool_form or GENERIC


def instructions(tools: Sequence[Tool]) -> str:
    """For models whose template knows no tools."""
    lines = "\n".join(json.dumps(tool.spec()["function"], ensure_ascii=False) for tool in tools)
    return INSTRUCTIONS.format(tools=lines, example=GENERIC.write("NAME", "{...}"))


def with_tools(body: ChatBody, answer: Wanted | None, form: CallForm) -> Wanted | None:
    """The grammar of an answer to `body`, which may be calls, or what it wanted anyway."""
    if not body.offered:
        return answer
    if answer is not None and not answer.is_json:
        raise InvalidInput(f"`{answer.param}` can't go with tools: only JSON can. Leave out one.", param=answer.param)
    tools = [tool for tool in body.offered if not _other(body, tool)]
    forced = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    single = body.parallel_tool_calls is False or isinstance(body.tool_choice, NamedTool)
    json_answer = None if answer is None else _json_rule(answer.schema)
    if form == IN_CHANNELS:  # where one call ends the answer
        arguments = {tool.function.name: _json_rule(tool.function.schema_of_arguments) for tool in tools}
        lines = channel_rules(arguments, forced, json_answer)
    else:
        lines = [*_calls(tools, form), *_answers(form, forced, single, json_answer)]
    is_json = forced or answer is not None
    return Wanted("tools", lark_grammar("\n".join(["%llguidance {}", *lines])), True if is_json else None)


def _other(body: ChatBody, tool: Tool) -> bool:
    return isinstance(body.tool_choice, NamedTool) and tool.function.name != body.tool_choice.function.name


def _calls(tools: Sequence[Tool], form: ToolForm) -> Iterator[str]:
    """Rules of what follows the trigger, a tool each."""
    yield "rest: " + " | ".join(f"call_{place}" for place in range(len(tools)))
    after = form.begin.removeprefix(form.trigger)
    for place, tool in enumerate(tools):
        head = json.dumps(after + tool.function.name + form.middle)
        schema = _json_rule(tool.function.schema_of_arguments)
        yield f"call_{place}: {head} {schema} {json.dumps(form.end)}"


def _answers(form: ToolForm, forced: bool, single: bool, json_answer: str | None) -> list[str]:
    if forced:
        return _only(form, single)
    if json_answer is None:
        return _text_or(form, single)
    return [*_only(form, single, rule="calls"), "start: calls | answer", f"answer: {json_answer}"]


def _only(form: ToolForm, single: bool, rule: str = "start") -> list[str]:
    more = "" if single else f" further{{0,{MOST_CALLS - 1}}}"
    between = json.dumps(form.between) if form.between else ""
    return [f"{rule}: one{more}", f"one: {json.dumps(form.trigger)} rest", f"further: {between} one"]


def _text_or(form: ToolForm, single: bool) -> list[str]:
    many = "?" if single else f"{{0,{MOST_CALLS}}}"
    return [
        f"start: one{many} tail",
        "one: head rest",
        f"head[lazy]: TEXT {json.dumps(form.trigger)}",
        "tail: TEXT",
        r"TEXT: /(.|\n)*/",
    ]


def _json_rule(schema: Schema | None) -> str:
    whole = dict(schema) if isinstance(schema, dict) else {}
    return "%json " + json.dumps({**whole, "x-guidance": ONE_LINE})


@dataclass(frozen=True, slots=True)
class Begun:
    """The model began to call a tool."""

    index: int
    name: str
    id: str

    @classmethod
    def new(cls, index: int, name: str) -> Begun:
        return cls(index, name, f"call_{fresh_id()[:24]}")


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON of a call's arguments."""

    index: int
    text: str


Piece = str | Begun | Arguments  # a str is text that is no call


class CallReader:
    """Text in, pieces out as soon as they are certain. Reads what the grammar of `with_tools` lets through."""

    def __init__(self, form: ToolForm) -> None:
        self._form = form
        self._head = form.begin.removeprefix(form.trigger)
        self._held = ""
        self._state = self._text
        self._skip = ""  # what may stand before the next text and is none
        self._object = JsonEnd()
        self.calls = 0

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while (found := self._state()) is not None:
            pieces += found
        return pieces

    def flush(self) -> list[Piece]:
        """The answer has ended: what looked like the beginning of a call is text; one that began stays unfinished."""
        held, self._held = self._held, ""
        if self._state == self._text:
            return [held] if held.strip() or (held and not self.calls) else []
        return [Arguments(self.calls - 1, held)] if self._state == self._arguments and held else []

    def _text(self) -> list[Piece] | None:
        """None: nothing more is certain."""
        trigger = self._form.trigger
        at = self._held.find(trigger)
        if at >= 0:
            said, self._held, self._state = self._held[:at], self._held[at + len(trigger) :], self._name
            return [said] if said.strip() else []
        if self.calls and not self._held.strip():
            return None  # blanks between calls
        keep = next((n for n in range(len(trigger) - 1, 0, -1) if self._held.endswith(trigger[:n])), 0)
        said, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return [said] if said else None

    def _name(self) -> list[Piece] | None:
        at = self._held.find(self._form.middle, len(self._head))
        if at < 0:
            return None
        begun = Begun.new(self.calls, self._held[len(self._head) : at])
        self._held, self._state = self._held[at + len(self._form.middle) :], self._arguments
        self._object = JsonEnd()
        self.calls += 1
        return [begun]

    def _arguments(self) -> list[Piece] | None:
        said, self._held = self._object.split(self._held)
        if self._object.reached:
            self._state = self._end
        return [Arguments(self.calls - 1, said)] if said else None

    def _end(self) -> list[Piece] | None:
        if len(self._held) < len(self._form.end):
            return None
        self._held, self._state = self._held[len(self._form.end) :], self._text
        return []


def call_object(begun: Begun) -> dict[str, Any]:
    return {"id": begun.id, "type": "function", "function": {"name": begun.name, "arguments": ""}}
