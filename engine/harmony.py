"""Harmony, in which gpt-oss answers: `<|channel|>NAME<|message|>TEXT<|end|>`, then `<|start|>assistant` and the next
channel. The marks are special tokens; https://github.com/openai/harmony has the form."""

from __future__ import annotations

START, CHANNEL, MESSAGE, END = MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")


def is_said(header: str) -> bool:
    """Whether what follows the header, all that stands before its `<|message|>`, is for the user's eyes: the final
    channel is, and a preamble; what is thought, or written to a tool, is not."""
    name = header.rpartition(CHANNEL)[2].split(maxsplit=1)[:1]
    return name == ["final"] or (name == ["commentary"] and " to=" not in header)
