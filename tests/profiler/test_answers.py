"""Answers that the whole model gives to items without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.requests import FinishedEvent, GenerationRequest, Sampling
from engine.tiny import write_tiny
from profiler.answers import own_answers
from profiler.batches import encode_corpus, item_limit
from profiler.corpus import Item, gather
from profiler.progress import Progress, ignore

KNOWN = Item("what is two and two", "four", line=1)
LACKING = [Item(f"question {n} " + "y" * n, line=n + 2) for n in range(5)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model: Path = write_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"), seed=3)
    with Engine.open(EngineConfig(model, max_context=64, max_batch=2)) as opened:
        yield opened


def alone(engine: Engine, prompt: tuple[int, ...], tokens: int) -> str:
    *_, last = engine.generate([GenerationRequest(prompt, None, "exact", Sampling(max_tokens=tokens))])
    assert isinstance(last, FinishedEvent)
    return last.text


def test_only_items_without_a_response_get_one_and_it_is_the_whole_models(engine: Engine) -> None:
    corpus = gather([KNOWN, *LACKING])
    told: list[Progress] = []
    found = own_answers(engine, corpus, 4, "t", told.append)
    assert found.items[0] == KNOWN
    prompts = {one.number: one.prompt for one in encode_corpus(engine, corpus)}
    answers = [alone(engine, prompts[number], 4) for number in range(1, 6)]
    assert [item.response for item in found.items[1:]] == [answer if answer.strip() else None for answer in answers]
    assert any(answers)
    assert [(step.stage, step.done, step.total) for step in told] == [("answer", n, 5) for n in range(1, 6)]


def test_what_it_makes_can_be_encoded_again(engine: Engine) -> None:
    long = Item("z" * (item_limit(engine) - 30), line=1)
    found = own_answers(engine, gather([long, *LACKING]), 40, "t", ignore)
    for one in encode_corpus(engine, found):
        assert len(one.tokens) <= item_limit(engine)


def test_a_text_that_lacks_nothing_comes_back_as_it_was(engine: Engine) -> None:
    corpus = gather([KNOWN])
    assert own_answers(engine, corpus, 4, "t", ignore) == corpus
