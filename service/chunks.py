"""OpenAI's streams: events of the engine in, frames out, with usage where it is asked for and `[DONE]` at the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from engine.requests import Event, FinishedEvent, Score, TokenEvent
from engine.text import Tokenizer
from service.answer_reader import AnswerReader, Forms
from service.bodies import StreamOptions
from service.merging import merged
from service.replies import Reply, delta_choice, prompt_tokens, text_choice, token_usage, usage
from service.running import Running
from service.scores import chat_scores, completion_scores
from service.sse import DONE, DataFrames
from service.thought_reader import Thought
from service.tools import Arguments, Begun, Piece, call_object

Choices = Callable[[Event], list[dict[str, Any]]]  # of one event of one answer; none: nothing to show yet


async def stream_frames(
    reply: Reply, running: Sequence[Running], options: StreamOptions | None, choices: Sequence[Choices]
) -> AsyncIterator[bytes]:
    """A chunk for each token that shows, those of one look in one piece: sending costs more than they do.

    The chunk that ends a choice also carries its receipt, for usage comes only where it is asked for.
    """
    options = options or StreamOptions()
    written = DataFrames(reply.chunk_head())
    finished: dict[int, FinishedEvent] = {}
    counts = [0] * len(running)
    async for found in merged(running):
        if isinstance(found, bytes):
            yield found
            continue
        place, events = found
        frames = b""
        for event in events:
            more: dict[str, object] = {}
            if isinstance(event, FinishedEvent):
                finished[place] = event
                more["expert"] = running[place].receipt(event).json()
            else:
                counts[place] += 1
            if options.include_usage:
                more["usage"] = _running_usage(running, counts) if options.continuous_usage_stats else None
            shown = choices[place](event)
            if shown:
                frames += written.frame({"choices": shown, **more})
        if len(finished) == len(running):
            yield frames + last_frames(written, running, finished, options)
        elif frames:
            yield frames


def last_frames(
    written: DataFrames, running: Sequence[Running], finished: Mapping[int, FinishedEvent], options: StreamOptions
) -> bytes:
    if not options.include_usage:
        return DONE
    ordered = [finished[place] for place in range(len(running))]
    return written.frame({"choices": [], "usage": usage(running, ordered)}) + DONE


def _running_usage(running: Sequence[Running], counts: Sequence[int]) -> dict[str, Any]:
    return token_usage(prompt_tokens(running), sum(counts))


class ChatChoices:
    """The chunks of one answer. The role comes with the first text, or with the end of an answer that has none.

    `ended` is told of the end before its chunks are made.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        forms: Forms,
        named: bool = False,
        ended: Callable[[FinishedEvent], object] = lambda _: None,
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._reader = AnswerReader(forms)
        self._named, self._ended = named, ended
        self._opened = False
        self._scores: list[Score] = []  # of tokens whose text is still to come

    def __call__(self, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, TokenEvent):
            if event.score is not None:
                self._scores.append(event.score)
            return [self._choice(delta) for delta in self._deltas(self._reader.push(event.text))]
        self._ended(event)
        rest = self._deltas(self._reader.flush())
        last: dict[str, Any] = {} if self._opened else {"role": "assistant", "content": ""}
        return [*(self._choice(delta) for delta in rest), self._choice(last, self._reason(event))]

    def _deltas(self, pieces: Sequence[Thought | Piece]) -> list[dict[str, Any]]:
        deltas = []
        for piece in pieces:
            delta = {} if self._opened else {"role": "assistant"}
            self._opened = True
            deltas.append({**delta, **_delta(piece)})
        return deltas

    def _choice(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        logprobs = chat_scores(self._scores, self._tokenizer) if self._scores else None
        self._scores = []
        return delta_choice(self._index, delta, reason, logprobs)

    def _reason(self, finished: FinishedEvent) -> str:
        return finish_reason(finished, self._reader.calls, self._named)


def finish_reason(finished: FinishedEvent, calls: int, named: bool) -> str:
    """OpenAI says "stop" where the one tool was named by the client."""
    return "tool_calls" if calls and finished.reason == "stop" and not named else finished.reason


def _delta(piece: Thought | Piece) -> dict[str, Any]:
    if isinstance(piece, Thought):
        return {"reasoning_content": piece.text}
    if isinstance(piece, Begun):
        return {"tool_calls": [{"index": piece.index, **call_object(piece)}]}
    if isinstance(piece, Arguments):
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}
    return {"content": piece}


class CompletionChoices:
    """The chunks of one answer; the first one shows the prompt where it is to be echoed."""

    def __init__(self, index: int, tokenizer: Tokenizer, echo: str = "") -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._echo = echo
        self._scores: list[Score] = []
        self._told = b""  # the text of the scores that were given

    def __call__(self, event: Event) -> list[dict[str, Any]]:
        echo, self._echo = self._echo, ""
        if isinstance(event, FinishedEvent):
            if not event.completion_tokens:
                self._scores += event.prompt_scores
            return [self._choice(echo, event.reason)]
        self._scores += event.prompt_scores
        if event.score is not None:
            self._scores.append(event.score)
        text = echo + event.text
        return [self._choice(text)] if text else []

    def _choice(self, text: str, reason: str | None = None) -> dict[str, Any]:
        if not self._scores:
            return text_choice(self._index, text, reason)
        logprobs = completion_scores(self._scores, self._tokenizer, self._told)
        self._told += b"".join(self._tokenizer.spell(score.token)[1] for score in self._scores)
        self._scores = []
        return text_choice(self._index, text, reason, logprobs)
