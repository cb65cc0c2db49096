"""Thoughts told from what an answer says, by the marks that the model's template has for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine.thought_form import ThoughtForm
from service.tools import Piece


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of what the model thinks before it answers."""

    text: str


Found = list[Thought | Piece]


class Reader:
    """Text in, pieces out: a state at a time, which takes from what is `_held` all that is certain."""

    def __init__(self) -> None:
        self._held = ""
        self._state: Callable[[], Found | None] = self._start

    def push(self, text: str) -> Found:
        self._held += text
        pieces: Found = []
        while (found := self._state()) is not None:
            pieces += found
        return pieces

    def _start(self) -> Found | None:
        """None: nothing more is certain."""
        raise NotImplementedError

    def _text(self) -> Found | None:
        said, self._held = self._held, ""
        return [said] if said else None


class ThoughtReader(Reader):
    """Text in, pieces out: thoughts, and as plain text what comes behind them. Blanks beside the marks are left out.

    Only what an answer begins with is a thought: marks further behind are text. Where the model calls a tool without an
    end of its thought, the call, which begins with `trigger`, is the end.
    """

    def __init__(self, form: ThoughtForm, opened: bool, trigger: str | None = None) -> None:
        super().__init__()
        self._form, self._opened = form, opened
        self._ends = [form.end, *([trigger] if trigger else [])]

    def flush(self) -> Found:
        """The answer has ended, perhaps inside its thought, or inside what looked like a mark."""
        held, self._held = self._held, ""
        thinking = self._state == self._thinking or (self._state == self._start and self._opened)
        if not thinking:
            return [held] if held and self._state != self._gap else []
        return [Thought(held.rstrip())] if held.strip() else []

    def _start(self) -> Found | None:
        """None: nothing more is certain. A model may write the mark again that its prompt ends with."""
        said, begin = self._held.lstrip(), self._form.begin
        if begin.startswith(said) and said != begin:
            return None
        if said.startswith(begin):
            self._held, self._state = said[len(begin) :], self._lead
        else:
            self._state = self._lead if self._opened else self._text
        return []

    def _lead(self) -> Found | None:
        self._held = self._held.lstrip()
        if not self._held:
            return None
        self._state = self._thinking
        return []

    def _thinking(self) -> Found | None:
        found = [(at, mark) for mark in self._ends if (at := self._held.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            said, rest = self._held[:at].rstrip(), self._held[at:]
            ended = mark == self._form.end
            self._held = rest.removeprefix(mark) if ended else rest
            self._state = self._gap if ended else self._text
            return [Thought(said)] if said else []
        kept = max(possible_start(self._held, mark) for mark in self._ends)
        length = len(self._held[: len(self._held) - kept].rstrip())
        said, self._held = self._held[:length], self._held[length:]
        return [Thought(said)] if said else None

    def _gap(self) -> Found | None:
        self._held = self._held.lstrip()
        if not self._held:
            return None
        self._state = self._text
        return []


def possible_start(text: str, mark: str) -> int:
    """Length of the longest end of `text` that `mark` may begin with."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
