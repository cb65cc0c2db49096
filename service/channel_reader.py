"""Answers in harmony's channels (engine/harmony.py), taken apart: thoughts, what is said, and calls of tools."""

from __future__ import annotations

import re
from typing import Literal

from engine.harmony import CHANNEL, END, MESSAGE, RECIPIENT, START, called, is_said, spelt
from service.thought_reader import Found, Reader, Thought
from service.tools import Arguments, Begun

TEXT_ENDS = re.compile(f"[{END}{START}{CHANNEL}]")


class ChannelReader(Reader):
    """Text with signs of channels in, pieces out. Several thoughts, or texts, have a blank line between them.

    Only an answer that begins with a channel is read so, or, where `tools` are offered, with the recipient of a call.
    Where the sign of its end is missing, the next one ends a text. Without tools a call is a thought: nobody can answer
    it. Signs that stand elsewhere are spelt out.
    """

    def __init__(self, *, tools: bool = False) -> None:
        super().__init__()
        self._tools = tools
        self._openings = (CHANNEL, RECIPIENT.lstrip()) if tools else (CHANNEL,)
        self._kind: Literal["said", "thought", "call"] = "thought"
        self._told = set[str]()  # kinds that there were already
        self._lead = ""
        self.calls = 0

    def flush(self) -> Found:
        """The answer has ended. A header without its text says nothing; a call that is not whole stays so."""
        held, self._held = self._held, ""
        return [] if self._state == self._header or not held else [spelt(held)]

    def _start(self) -> Found | None:
        said = self._held.lstrip()
        if any(opening.startswith(said) and said != opening for opening in self._openings):
            return None
        self._state = self._header if said.startswith(self._openings) else self._text
        return []

    def _text(self) -> Found | None:
        said, self._held = self._held, ""
        return [spelt(said)] if said else None

    def _header(self) -> Found | None:
        header, sign, rest = self._held.partition(MESSAGE)
        if not sign:
            return None
        self._held, self._state = rest, self._body
        name = called(header) if self._tools else None
        if name is not None:
            self._kind, self.calls = "call", self.calls + 1
            return [Begun.new(self.calls - 1, name)]
        self._kind = "said" if is_said(header) else "thought"
        self._lead = "\n\n" if self._kind in self._told else ""
        return []

    def _body(self) -> Found | None:
        end = TEXT_ENDS.search(self._held)
        at = len(self._held) if end is None else end.start()
        text, self._held = self._held[:at], self._held[at:]
        if end is None:
            return self._piece(text) or None
        self._held, self._state = self._held.removeprefix(END), self._header
        return self._piece(text)

    def _piece(self, text: str) -> Found:
        if not text:
            return []
        text = spelt(text)
        if self._kind == "call":
            return [Arguments(self.calls - 1, text)]
        text, self._lead = self._lead + text, ""
        self._told.add(self._kind)
        return [text if self._kind == "said" else Thought(text)]
