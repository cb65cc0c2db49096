"""How a model writes the call of a tool, read off its own chat template by rendering calls that nobody made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]], bool], str]  # messages, tools, open end

NAMES = ("probe_function_a", "probe_function_b")
ARGUMENTS = re.compile(r'\{\s*"probe_key"\s*:\s*"probe_value"\s*\}')
QUESTION = {"role": "user", "content": "probe"}


@dataclass(frozen=True, slots=True)
class ToolForm:
    """A call is `begin`, the name, `middle`, the arguments as a JSON object, `end`; calls are `between` each other."""

    begin: str
    middle: str
    end: str
    between: str

    @property
    def trigger(self) -> str:
        """What shows that a call begins: the first line of `begin`."""
        return self.begin.partition("\n")[0]

    def write(self, name: str, arguments: str) -> str:
        return f"{self.begin}{name}{self.middle}{arguments}{self.end}"


GENERIC = ToolForm('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n")


def form_of(render: Render) -> ToolForm | None:
    """None where the template writes no calls, or not as a name followed by one JSON object."""
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in NAMES]
    calls = [
        {
            "id": f"call{place}",
            "type": "function",
            "function": {"name": name, "arguments": {"probe_key": "probe_value"}},
        }
        for place, name in enumerate(NAMES)
    ]
    opened = render([QUESTION], tools, True)
    whole = render([QUESTION, {"role": "assistant", "content": "", "tool_calls": calls}], tools, False)
    if not whole.startswith(opened):
        return None
    said = whole[len(opened) :]
    found = list(ARGUMENTS.finditer(said))
    places = [said.find(name) for name in NAMES]
    if len(found) != 2 or not 0 <= places[0] < found[0].start() < places[1] < found[1].start():
        return None
    begin = said[: places[0]].lstrip()
    middle = said[places[0] + len(NAMES[0]) : found[0].start()]
    gap, tail = said[found[0].end() : places[1]], said[found[1].end() :]
    end = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(gap, tail, strict=False))).rstrip()
    between = gap[len(end) : len(gap) - len(begin)]
    sound = begin and middle and end and gap == end + between + begin and not between.strip()
    return ToolForm(begin, middle, end, between) if sound else None
