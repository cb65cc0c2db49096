"""Harmony, in which gpt-oss answers: `<|channel|>NAME<|message|>TEXT<|end|>`, then `<|start|>assistant` and the next
channel. A call of a tool has its recipient in the header, ` to=functions.NAME`, before the mark of its channel or
behind it, and ends the answer. The marks are special tokens; https://github.com/openai/harmony has the form."""

from __future__ import annotations

import re

START, CHANNEL, MESSAGE, END, CONSTRAIN = MARKS = (
    "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>",
)  # fmt: skip
TURN = START + "assistant"  # what a prompt ends with
RECIPIENT = " to="

_NAME = re.compile(r"\s*(\w*)")
_FUNCTION = re.compile(RECIPIENT + r"functions\.([a-zA-Z0-9_.-]+)")


def is_said(header: str) -> bool:
    """Whether what follows the header, all that stands before its `<|message|>`, is for the user's eyes: the final
    channel is, and a preamble; what is thought, or written to a tool, is not."""
    match = _NAME.match(header.rpartition(CHANNEL)[2])
    name = match[1] if match else ""
    return name == "final" or (name == "commentary" and RECIPIENT not in header)


def called(header: str) -> str | None:
    """The function whose arguments follow the header; None where it calls none of a client's."""
    found = _FUNCTION.search(header)
    return found[1] if found else None
