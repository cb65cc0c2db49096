"""What the model says, taken apart: its thought, text, and calls of tools, as soon as each piece is certain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.harmony import CHANNEL, END, MESSAGE, START, is_said
from engine.text import Tokenizer
from engine.thought_form import ThoughtForm
from engine.tool_form import ToolForm
from service.tools import Arguments, Begun, CallReader, Piece, call_object

TAIL = 32  # tokens of a prompt, in whose text the mark of a thought lies whole


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class Forms:
    """How one answer may be written: `calls` None without tools, `thought` None where none is to be split off.
    With `channels` the text has their marks in it."""

    calls: ToolForm | None = None
    thought: ThoughtForm | None = None
    opened: bool = False  # the prompt ends inside the thought
    channels: bool = False

    @classmethod
    def after(cls, prompt: Sequence[int], tokenizer: Tokenizer, calls: ToolForm | None = None) -> Forms:
        thought = tokenizer.thought_form
        opened = thought is not None and thought.opened_by(tokenizer.decode(prompt[-TAIL:]))
        return cls(calls, thought, opened, tokenizer.has_channels)


class _Reader:
    """What thoughts are told by: a state at a time, which takes from what is `_held` all that is certain."""

    def __init__(self) -> None:
        self._held = ""
        self._state: Callable[[], list[Thought | str] | None] = self._start

    def push(self, text: str) -> list[Thought | str]:
        self._held += text
        pieces: list[Thought | str] = []
        while (found := self._state()) is not None:
            pieces += found
        return pieces

    def _start(self) -> list[Thought | str] | None:
        """None: nothing more is certain."""
        raise NotImplementedError

    def _text(self) -> list[Thought | str] | None:
        said, self._held = self._held, ""
        return [said] if said else None


class ThoughtReader(_Reader):
    """Text in, pieces out: thoughts, and as plain text what comes behind them. Blanks beside the marks are left out.

    Only what an answer begins with is a thought: marks further behind are text. Where the model calls a tool without an
    end of its thought, the call, which begins with `trigger`, is the end.
    """

    def __init__(self, form: ThoughtForm, opened: bool, trigger: str | None = None) -> None:
        super().__init__()
        self._form, self._opened = form, opened
        self._ends = [form.end, *([trigger] if trigger else [])]

    def flush(self) -> list[Thought | str]:
        """The answer has ended, perhaps inside its thought, or inside what looked like a mark."""
        held, self._held = self._held, ""
        thinking = self._state == self._thinking or (self._state == self._start and self._opened)
        if not thinking:
            return [held] if held and self._state != self._gap else []
        return [Thought(held.rstrip())] if held.strip() else []

    def _start(self) -> list[Thought | str] | None:
        """None: nothing more is certain. A model may write the mark again that its prompt ends with."""
        said, begin = self._held.lstrip(), self._form.begin
        if begin.startswith(said) and said != begin:
            return None
        if said.startswith(begin):
            self._held, self._state = said[len(begin) :], self._lead
        else:
            self._state = self._lead if self._opened else self._text
        return []

    def _lead(self) -> list[Thought | str] | None:
        self._held = self._held.lstrip()
        if not self._held:
            return None
        self._state = self._thinking
        return []

    def _thinking(self) -> list[Thought | str] | None:
        found = [(at, mark) for mark in self._ends if (at := self._held.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            said, rest = self._held[:at].rstrip(), self._held[at:]
            ended = mark == self._form.end
            self._held = rest.removeprefix(mark) if ended else rest
            self._state = self._gap if ended else self._text
            return [Thought(said)] if said else []
        kept = max(_possible_start(self._held, mark) for mark in self._ends)
        length = len(self._held[: len(self._held) - kept].rstrip())
        said, self._held = self._held[:length], self._held[length:]
        return [Thought(said)] if said else None

    def _gap(self) -> list[Thought | str] | None:
        self._held = self._held.lstrip()
        if not self._held:
            return None
        self._state = self._text
        return []


def _possible_start(text: str, mark: str) -> int:
    """Length of the longest end of `text` that `mark` may begin with."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


class ChannelReader(_Reader):
    """Text with marks of channels in, pieces out. Several thoughts, or texts, have a blank line between them.

    Only an answer that begins with a channel is read so. Where a mark of its end is missing, the next one ends a text.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said = False
        self._told = set[bool]()  # what there was already: said True, thought False
        self._lead = ""

    def flush(self) -> list[Thought | str]:
        """The answer has ended. A header without its text says nothing."""
        held, self._held = self._held, ""
        if self._state == self._header:
            return []
        return self._piece(held) if self._state == self._body else [held] if held else []

    def _start(self) -> list[Thought | str] | None:
        said = self._held.lstrip()
        if CHANNEL.startswith(said) and said != CHANNEL:
            return None
        self._state = self._header if said.startswith(CHANNEL) else self._text
        return []

    def _header(self) -> list[Thought | str] | None:
        header, mark, rest = self._held.partition(MESSAGE)
        if not mark:
            return None
        self._held, self._said, self._state = rest, is_said(header), self._body
        self._lead = "\n\n" if self._said in self._told else ""
        return []

    def _body(self) -> list[Thought | str] | None:
        found = [at for mark in (END, START, CHANNEL) if (at := self._held.find(mark)) >= 0]
        kept = 0 if found else max(_possible_start(self._held, mark) for mark in (END, START, CHANNEL))
        at = min(found, default=len(self._held) - kept)
        text, self._held = self._held[:at], self._held[at:]
        if found:
            pieces = self._piece(text)
            self._held, self._state = self._held.removeprefix(END), self._header
            return pieces
        return self._piece(text) or None

    def _piece(self, text: str) -> list[Thought | str]:
        if not text:
            return []
        text, self._lead = self._lead + text, ""
        self._told.add(self._said)
        return [text if self._said else Thought(text)]


def thought_reader(forms: Forms) -> ThoughtReader | ChannelReader | None:
    if forms.channels:
        return ChannelReader()
    trigger = None if forms.calls is None else forms.calls.trigger
    return None if forms.thought is None else ThoughtReader(forms.thought, forms.opened, trigger)


class AnswerReader:
    """The whole of it: first the thought is split off, then calls are read out of the rest."""

    def __init__(self, forms: Forms) -> None:
        self._thoughts = thought_reader(forms)
        self._calls = None if forms.calls is None else CallReader(forms.calls)

    @property
    def calls(self) -> int:
        return 0 if self._calls is None else self._calls.calls

    def push(self, text: str) -> list[Thought | Piece]:
        return list(self._read([text] if self._thoughts is None else self._thoughts.push(text)))

    def flush(self) -> list[Thought | Piece]:
        rest = [] if self._thoughts is None else list(self._read(self._thoughts.flush()))
        return [*rest, *(self._calls.flush() if self._calls is not None else [])]

    def _read(self, pieces: Iterable[Thought | str]) -> Iterable[Thought | Piece]:
        for piece in pieces:
            if isinstance(piece, Thought):
                yield piece
            elif self._calls is not None:
                yield from self._calls.push(piece)
            elif piece:
                yield piece


def message_of(text: str, forms: Forms) -> dict[str, Any]:
    """The assistant's message of a whole answer. Without tools or a thought it is the text; with calls, text may be
    none."""
    if forms.calls is None and forms.thought is None and not forms.channels:
        return {"role": "assistant", "content": text}
    reader = AnswerReader(forms)
    said, thought, calls = "", "", dict[int, dict[str, Any]]()
    for piece in [*reader.push(text), *reader.flush()]:
        if isinstance(piece, Begun):
            calls[piece.index] = call_object(piece)
        elif isinstance(piece, Arguments):
            calls[piece.index]["function"]["arguments"] += piece.text
        elif isinstance(piece, Thought):
            thought += piece.text
        else:
            said += piece
    message: dict[str, Any] = {"role": "assistant", "content": said if said or not calls else None}
    if thought:
        message["reasoning_content"] = thought
    return {**message, "tool_calls": list(calls.values())} if calls else message
