"""Harmony, in which gpt-oss answers: `<|channel|>NAME<|message|>TEXT<|end|>`, then `<|start|>assistant` and the next
channel. A call of a tool has its recipient in the header, ` to=functions.NAME`, before the mark of its channel or
behind it, and ends the answer. The marks are special tokens; https://github.com/openai/harmony has the form.

In decoded text each mark is a sign of its own: one character that no text has, half of a UTF-16 pair. So a mark that
the model merely spells out, as where it tells of harmony, stays text.
"""

from __future__ import annotations

import re
from types import MappingProxyType

MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>")
SIGNS = MappingProxyType({mark: chr(0xD800 + place) for place, mark in enumerate(MARKS)})
START, CHANNEL, MESSAGE, END, CONSTRAIN = SIGNS.values()
TURN = "<|start|>assistant"  # what a prompt ends with
RECIPIENT = " to="

_SPELT = str.maketrans({sign: mark for mark, sign in SIGNS.items()})
_NAME = re.compile(r"\s*(\w*)")
_FUNCTION = re.compile(RECIPIENT + r"functions\.([a-zA-Z0-9_.-]+)")


def spelt(text: str) -> str:
    """With the names of marks in the place of their signs, for whoever is to read it."""
    return text.translate(_SPELT)


def is_said(header: str) -> bool:
    """Whether what follows the header, all that stands before its MESSAGE, is for the user's eyes: the final channel
    is, and a preamble; what is thought, or written to a tool, is not."""
    match = _NAME.match(header.rpartition(CHANNEL)[2])
    name = match[1] if match else ""
    return name == "final" or (name == "commentary" and RECIPIENT not in header)


def called(header: str) -> str | None:
    """The function whose arguments follow the header; None where it calls none of a client's."""
    found = _FUNCTION.search(header)
    return found[1] if found else None
