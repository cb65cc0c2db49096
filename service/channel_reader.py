"""Answers in harmony's channels (engine/harmony.py), taken apart: thoughts, what is said, and calls of tools."""

from __future__ import annotations

from typing import Literal

from engine.harmony import CHANNEL, END, MESSAGE, RECIPIENT, START, called, is_said
from service.json_end import JsonEnd
from service.thought_reader import Found, Reader, Thought, possible_start
from service.tools import Arguments, Begun

MARKS = (END, START, CHANNEL)  # which of them comes first ends a text


class ChannelReader(Reader):
    """Text with marks of channels in, pieces out. Several thoughts, or texts, have a blank line between them.

    Only an answer that begins with a channel is read so, or, where `tools` are offered, with the recipient of a call.
    Where a mark of its end is missing, the next one ends a text; the arguments of a call end where their JSON does, so
    a mark that is spelt out in them is theirs. Without tools a call is a thought: nobody can answer it.
    """

    def __init__(self, *, tools: bool = False) -> None:
        super().__init__()
        self._tools = tools
        self._openings = (CHANNEL, RECIPIENT.lstrip()) if tools else (CHANNEL,)
        self._kind: Literal["said", "thought"] = "thought"
        self._told = set[str]()  # kinds that there were already
        self._lead = ""
        self._object = JsonEnd()
        self.calls = 0

    def flush(self) -> Found:
        """The answer has ended. A header without its text says nothing; a call that is not whole stays so."""
        held, self._held = self._held, ""
        if self._state == self._header or not held:
            return []
        if self._state == self._arguments:
            return [Arguments(self.calls - 1, held)]
        return self._piece(held) if self._state == self._body else [held]

    def _start(self) -> Found | None:
        said = self._held.lstrip()
        if any(opening.startswith(said) and said != opening for opening in self._openings):
            return None
        self._state = self._header if said.startswith(self._openings) else self._text
        return []

    def _header(self) -> Found | None:
        header, mark, rest = self._held.partition(MESSAGE)
        if not mark:
            return None
        self._held = rest
        name = called(header) if self._tools else None
        if name is not None:
            self._state, self._object = self._arguments, JsonEnd()
            self.calls += 1
            return [Begun.new(self.calls - 1, name)]
        self._state, self._kind = self._body, "said" if is_said(header) else "thought"
        self._lead = "\n\n" if self._kind in self._told else ""
        return []

    def _body(self) -> Found | None:
        found = [at for mark in MARKS if (at := self._held.find(mark)) >= 0]
        kept = 0 if found else max(possible_start(self._held, mark) for mark in MARKS)
        at = min(found, default=len(self._held) - kept)
        text, self._held = self._held[:at], self._held[at:]
        if found:
            pieces = self._piece(text)
            self._held, self._state = self._held.removeprefix(END), self._header
            return pieces
        return self._piece(text) or None

    def _piece(self, text: str) -> Found:
        if not text:
            return []
        text, self._lead = self._lead + text, ""
        self._told.add(self._kind)
        return [text if self._kind == "said" else Thought(text)]

    def _arguments(self) -> Found | None:
        said, self._held = self._object.split(self._held)
        if self._object.reached:
            self._state = self._header
        return [Arguments(self.calls - 1, said)] if said else None
