"""Evidence from one forward an item, beside the generated answers that it stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import demo
from engine.config import EngineConfig
from engine.engine import Engine
from engine.requests import FinishedEvent, GenerationRequest, Sampling
from engine.tiny import write_tiny
from profiler.batches import encode_corpus
from profiler.corpus import Item, gather, read_corpus
from profiler.evaluate import evaluate
from profiler.forced import evaluate_each, evaluate_forced
from store.home import bundled_model
from store.records import Selection

SELECTIONS = [
    None,
    Selection.of([[0, 2, 4, 6], [1, 2, 3, 4], [0, 1, 6, 7]]),
    Selection.of([[1, 3], [0, 5], [2, 7]]),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = write_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"), seed=8)
    with Engine.open(EngineConfig(folder, max_context=64, max_batch=8)) as opened:
        yield opened


def said(engine, prompt: str, selection, length: int) -> str:
    """What the model answers by itself, so that there is something to be right about."""
    ids = engine.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    request = GenerationRequest(ids, selection, "exact" if selection is None else "mask", Sampling(max_tokens=length))
    [done] = [event for event in engine.generate([request]) if isinstance(event, FinishedEvent)]
    return done.text


def corpus_of(engine, selection):
    """Answers that are right, too short, too long, or wrong in the first, a middle or the last letter."""
    draw, items = np.random.default_rng(3), []
    for number in range(16):
        prompt = f"q{number} " + "x" * int(draw.integers(0, 8))
        answer = said(engine, prompt, selection, int(draw.integers(1, 7))) or "a"
        place = int(draw.integers(0, len(answer)))
        changed = [answer, answer[:-1], answer + "z", answer[:place] + "#" + answer[place + 1 :], " " + answer][
            number % 5
        ]
        if changed.strip():
            items.append(Item(prompt, changed, line=number))
    return encode_corpus(engine, gather([*items, Item("no answer is known")]))


@pytest.mark.parametrize("selection", SELECTIONS, ids=["whole", "half", "quarter"])
def test_forced_evidence_is_that_of_generated_answers(engine, selection):
    text = corpus_of(engine, selection)
    slow, fast = evaluate(engine, text, selection, rows=5), evaluate_forced(engine, text, selection, rows=5)
    assert (fast.items, fast.right, fast.answered, fast.scored) == (slow.items, slow.right, slow.answered, slow.scored)
    assert fast.losses == pytest.approx(slow.losses, rel=1e-6)
    assert 0 < fast.coverage <= 1


@pytest.mark.parametrize("task", ["arithmetic", "python"])
def test_the_bundled_model_s_answers_which_end_by_themselves_are_judged_alike(task):
    """At an eighth of the experts about half of them are wrong, in all ways a trained model is wrong."""
    rotated = Selection.of([[(8 * layer + n) % 64 for n in range(24)] for layer in range(6)])
    data = Path(demo.__file__).parent / "data" / task / "test.jsonl"
    config = EngineConfig(bundled_model(), max_context=256, max_batch=25, dtype="float32", threads=1)
    with Engine.open(config) as engine:
        text = encode_corpus(engine, replace(read_corpus(data), items=read_corpus(data).items[:25]))
        for selection in (None, rotated):
            slow, fast = evaluate(engine, text, selection, rows=25), evaluate_forced(engine, text, selection, rows=25)
            assert fast.right == slow.right
            assert fast.losses == pytest.approx(slow.losses, rel=1e-4)
            assert fast.coverage == pytest.approx(slow.coverage, abs=0.05)


def test_every_item_may_have_a_selection_of_its_own(engine):
    text = corpus_of(engine, None)
    given = [SELECTIONS[number % 3] for number in range(len(text))]
    together = evaluate_each(engine, text, given, rows=4)
    alone = sum(
        (evaluate_each(engine, [one], [selection], role=1) for one, selection in zip(text[1:], given[1:], strict=True)),
        start=evaluate_each(engine, text[:1], given[:1], role=1),
    )
    assert together.right == alone.right
    assert together.losses == pytest.approx(alone.losses, rel=1e-6)
    assert together.covered == pytest.approx(alone.covered, rel=1e-6)
