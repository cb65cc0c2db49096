"""Tools of a model that answers in harmony's channels: the grammar of its calls, and its template's view of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from engine.harmony import MARKS, RECIPIENT

START, CHANNEL, MESSAGE, END, CONSTRAIN = MARKS  # as a grammar names special tokens

Turn = Mapping[str, Any]


def channel_rules(arguments: Mapping[str, str], forced: bool, answer: str | None) -> list[str]:
    """Rules of one answer: thoughts and a preamble, then the final text or one call, which ends it.

    `arguments` are rules of each function's; `answer` is that of JSON in the place of thoughts and text. What a grammar
    rules from its beginning has no thought.
    """
    calls = [f"call_{place}" for place in range(len(arguments))]
    lines = [
        "call: " + " | ".join(calls),
        f'kind: (" json" | " "? {CONSTRAIN} "json") {MESSAGE}',
    ]
    for call, (name, rule) in zip(calls, arguments.items(), strict=True):
        to = f"{RECIPIENT}functions.{name}"
        behind = f"{CHANNEL} {json.dumps('commentary' + to)} kind"
        before = f'{json.dumps(to)} {CHANNEL} "commentary" kind'
        lines.append(f"{call}: ({behind} | {before}) {rule}")
    if forced:
        return [*lines, "start: call"]
    if answer is not None:
        return [*lines, "start: call | answer", f"answer: {answer}"]
    note = f'{CHANNEL} ("analysis" | "commentary") {MESSAGE} TEXT {END} {START} "assistant"'
    return [
        *lines,
        "start: note* (call | final)",
        f"note: {note}",
        f'final: {CHANNEL} "final" {MESSAGE} TEXT',
        r"TEXT: /(.|\n)*/",
    ]


def one_call_each(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation as the template can write it: it takes one call a message, and its result right behind it."""
    told, rest = list[Turn](), list(turns)
    while rest:
        turn, *rest = rest
        if not turn.get("tool_calls"):
            told.append(turn)
            continue
        results = list(takewhile(lambda further: further["role"] == "tool", rest))
        told += _calls_with_results(turn, results)
        rest = rest[len(results) :]
    return told


def _calls_with_results(turn: Turn, results: list[Turn]) -> Iterator[Turn]:
    """What was said or thought before the first call is its `thinking`, as the template has it."""
    thinking = "\n\n".join(filter(None, (turn.get("reasoning_content"), turn["content"])))
    for place, call in enumerate(turn["tool_calls"]):
        thought = {"thinking": thinking} if thinking and not place else {}
        yield {"role": "assistant", "content": "", "tool_calls": [call], **thought}
        yield from (result for result in results if result["tool_call_id"] == call["id"])
    known = {call["id"] for call in turn["tool_calls"]}
    yield from (result for result in results if result["tool_call_id"] not in known)


def described(spec: Mapping[str, Any]) -> dict[str, Any]:
    """With a description, which the template wants of every function."""
    return {**spec, "function": {"description": "", **spec["function"]}}
