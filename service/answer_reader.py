"""What the model says, taken apart: its thought, text, and calls of tools, as soon as each piece is certain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.text import Tokenizer
from engine.thought_form import ThoughtForm
from engine.tool_form import ToolForm
from service.channel_reader import ChannelReader
from service.thought_reader import Found, Thought, ThoughtReader
from service.tools import IN_CHANNELS, Arguments, Begun, CallForm, CallReader, Piece, call_object

TAIL = 32  # tokens of a prompt, in whose text the mark of a thought lies whole


@dataclass(frozen=True, slots=True)
class Forms:
    """How one answer may be written: `calls` None without tools, `thought` None where none is to be split off.
    With `channels` the text has their marks in it."""

    calls: CallForm | None = None
    thought: ThoughtForm | None = None
    opened: bool = False  # the prompt ends inside the thought
    channels: bool = False

    @classmethod
    def after(cls, prompt: Sequence[int], tokenizer: Tokenizer, calls: CallForm | None = None) -> Forms:
        thought = tokenizer.thought_form
        opened = thought is not None and thought.opened_by(tokenizer.decode(prompt[-TAIL:]))
        return cls(calls, thought, opened, tokenizer.has_channels)

    @classmethod
    def ruled(cls, calls: CallForm | None = None) -> Forms:
        """Of an answer that a grammar rules from its beginning: it has no thought."""
        return cls(calls, channels=calls == IN_CHANNELS)


def first_reader(forms: Forms) -> ThoughtReader | ChannelReader | None:
    if forms.channels:
        return ChannelReader(tools=forms.calls == IN_CHANNELS)
    trigger = forms.calls.trigger if isinstance(forms.calls, ToolForm) else None
    return None if forms.thought is None else ThoughtReader(forms.thought, forms.opened, trigger)


class AnswerReader:
    """The whole of it: first the thought is split off, then calls are read out of the rest, where they are not in
    channels of their own."""

    def __init__(self, forms: Forms) -> None:
        self._first = first_reader(forms)
        self._calls = CallReader(forms.calls) if isinstance(forms.calls, ToolForm) else None

    @property
    def calls(self) -> int:
        """How many began."""
        readers = (self._first, self._calls)
        return sum(reader.calls for reader in readers if isinstance(reader, ChannelReader | CallReader))

    def push(self, text: str) -> Found:
        if self._first is None and self._calls is None:  # plain text, as most is: every token comes through here
            return [text] if text else []
        return list(self._read([text] if self._first is None else self._first.push(text)))

    def flush(self) -> Found:
        rest = [] if self._first is None else list(self._read(self._first.flush()))
        return [*rest, *(self._calls.flush() if self._calls is not None else [])]

    def _read(self, pieces: Iterable[Thought | Piece]) -> Iterable[Thought | Piece]:
        for piece in pieces:
            if isinstance(piece, str) and self._calls is not None:
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
