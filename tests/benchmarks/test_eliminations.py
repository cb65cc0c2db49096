"""The bench's plain elimination against the profiler's, and what swaps promise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from benchmarks.eliminations import ERRORS, WAYS, Tried, Way, choose, look
from engine.config import EngineConfig
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler.batches import encode_corpus
from profiler.corpus import Item, gather
from profiler.elimination import answer_eliminations, eliminations

CORPUS = gather([Item(f"number {n} " + "and more " * (n % 4), "yes or no") for n in range(8)])


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = write_tiny("olmoe", tmp_path_factory.mktemp("m"), seed=5)
    with torch.inference_mode(), Engine.open(EngineConfig(folder, max_context=128, max_batch=8)) as opened:
        yield opened


@pytest.mark.parametrize("answers", [False, True])
def test_the_first_way_drops_what_the_profilers_elimination_drops(engine: Engine, answers: bool) -> None:
    text = encode_corpus(engine, CORPUS)
    ranked = (answer_eliminations if answers else eliminations)(engine, text, 4)
    found, tokens = choose(engine, text, Way(None, answers=answers), 0.5)
    assert tokens == sum(len(one.response if answers else one.tokens) for one in text)
    assert [set(ids) for ids in found.experts] == [set(np.argsort(-row, kind="stable")[:4].tolist()) for row in ranked]


@pytest.mark.parametrize("error", list(ERRORS))
def test_swaps_end_where_no_exchange_helps(engine: Engine, error: str) -> None:
    text = encode_corpus(engine, CORPUS)
    tried = Tried(engine, 0, look(engine, text, Way(48), None)[0], ERRORS[error])
    dropped = tried.drop(3)
    swapped = tried.exchange(dropped)
    assert tried.lost(swapped) <= tried.lost(dropped)
    neighbours = [kept for kept in combinations(range(8), 3) if len(set(kept) & set(swapped)) == 2]
    assert min(map(tried.lost, neighbours)) >= tried.lost(swapped) * (1 - 1e-9)


def test_with_layers_below_cut_the_first_layer_is_as_it_was(engine: Engine) -> None:
    text = encode_corpus(engine, CORPUS)
    alone, upon = (choose(engine, text, Way(below=below), 0.5)[0] for below in (False, True))
    assert alone.experts[0] == upon.experts[0]
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert replace(Way(), answers=True).name == "256 tokens of answers, squares"
