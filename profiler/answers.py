"""Answers for items that have none: the whole model's own, greedy and exact.

Evidence on such items says how far a selection agrees with the whole model, not whether either is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from engine.engine import Engine
from engine.requests import FinishedEvent, GenerationRequest, Sampling
from profiler.batches import Encoded, encode_corpus, item_limit
from profiler.corpus import Corpus
from profiler.progress import Progress, Report


def own_answers(engine: Engine, corpus: Corpus, tokens: int, task: str, report: Report) -> Corpus:
    """`corpus` with a response of at most `tokens` tokens for each item that lacked one.

    An item to which the model says nothing, or too much for one pass, stays without. Raises InvalidInput for an item
    that is too long.
    """
    lacking = [one for one in encode_corpus(engine, corpus) if one.item.response is None]
    items = list(corpus.items)
    for done, (one, text) in enumerate(_answered(engine, lacking, tokens), 1):
        if text.strip() and len(one.prompt) + len(engine.tokenizer.encode(text, special_tokens=False)) <= item_limit(
            engine
        ):
            items[one.number] = replace(one.item, response=text)
        report(Progress(task, "answer", done, len(lacking)))
    return replace(corpus, items=tuple(items))


def _answered(engine: Engine, lacking: Sequence[Encoded], tokens: int) -> Iterator[tuple[Encoded, str]]:
    room = item_limit(engine)
    asked = [one for one in lacking if len(one.prompt) < room]
    requests = [
        GenerationRequest(one.prompt, None, "exact", Sampling(max_tokens=min(tokens, room - len(one.prompt))))
        for one in asked
    ]
    for event in engine.generate(requests):
        if isinstance(event, FinishedEvent):
            yield asked[event.row], event.text
