"""Selections of a prompt's own: by the whole router's weights on its tokens, and never on its answer's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.prompt_selections import prompt_scores
from engine.config import EngineConfig
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler.batches import Encoded, encode_corpus
from profiler.corpus import Item, gather
from profiler.gather import gather_statistics
from profiler.progress import ignore
from profiler.run import Run
from store.records import F64


def _ranks(scores: F64) -> list[list[int]]:
    return [[int(each) for each in row] for row in np.argsort(-scores, axis=1)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    folder = write_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"), seed=3)
    with Engine.open(EngineConfig(folder, max_context=128, max_batch=4)) as opened:
        yield opened


def test_scores_are_the_passes_gates_of_the_prompt_alone(engine: Engine, tmp_path: Path) -> None:
    [one] = encode_corpus(engine, gather([Item("the cat sings to the red dog", "yes it does")]))
    found = prompt_scores(engine, one)
    bare: Encoded = replace(one, response=())
    wanted = gather_statistics(engine, [bare], Run(tmp_path, "p", ""), "t", 4, ignore, frozenset()).total("gates")
    chosen = wanted > 0
    assert 0 < chosen.sum() < chosen.size
    np.testing.assert_allclose(found[chosen], wanted[chosen], rtol=1e-4, atol=1e-5)
    assert found[~chosen].max() < found[chosen].min()
    assert len(set(found[~chosen].tolist())) > 1  # the mean logit orders what nobody chose
    assert _ranks(prompt_scores(engine, replace(one, response=one.response[:1]))) == _ranks(found)
