"""The search on a tiny real model: its winner, what it stores, and that it is done once."""

from __future__ import annotations

import re

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler import search as search_module
from profiler.allocators import PLAIN
from profiler.corpus import Item, gather
from profiler.evaluate import Measured, evaluate
from profiler.halving import badness
from profiler.job import profile_task
from profiler.options import Options
from profiler.search import describe, reasons_of
from store.database import open_store
from store.errors import InvalidInput
from store.records import TaskRecord

WORDS = ("red", "green", "blue", "cat", "dog", "sings", "sleeps")


def texts(seed: int, count: int):
    draw = np.random.default_rng(seed)
    return gather([Item(f"{seed} {n} " + " ".join(draw.choice(WORDS, 4)), "yes") for n in range(count)])


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = write_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"), seed=3)
    with Engine.open(EngineConfig(folder, max_context=128, max_batch=16)) as opened:
        yield opened


@pytest.fixture
def store(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/store.db") as opened:
        yield opened


@pytest.fixture
def run(engine, store, tmp_path):
    def call(**fields):
        chosen = {"scorers": ["reap", "easy_ep", "gate", "man"], "allocators": list(PLAIN), "keeps": (0.5,)}
        options = Options(rows=16, runs=tmp_path / "runs", search=True, **(chosen | fields))
        return profile_task(
            engine, store, TaskRecord("t"), texts(1, 8), texts(2, 20), embedder=HashEmbedder(), options=options
        )

    return call


def test_the_finalists_and_the_baselines_have_full_evidence_and_the_others_none(run, store):
    made = run()
    pairs = store.evaluations.list(made.id)
    assert {stored.scorer for stored, _ in pairs} > {"random", "frequency"}
    assert {measured.items for _, measured in pairs} == {20}
    rivals = [stored for stored, _ in pairs if stored.scorer not in {"random", "frequency"}]
    assert 1 <= len(rivals) <= 4  # of at most 16 different sets a quarter is left after two of three rounds
    assert len({stored.selection for stored in rivals}) == len(rivals)
    assert {stored.id for stored in store.selections.find(made.id)} == {stored.id for stored, _ in pairs}
    [reason] = reasons_of(store, made.id)
    assert reason.startswith("keep 0.5: ")
    assert "Against" in reason
    assert re.search(r"(\d+) candidates on 8 items, (\d+) candidates on 16 items, (\d+) candidates on 20 items", reason)
    assert "random 0 of 20 right (0% to 16%)" in reason
    best = min(pairs, key=lambda pair: (-pair[1].accuracy, pair[1].nll) if pair[0] in rivals else (1, 0))[0]
    assert f"{best.scorer} with {best.allocator}" in reason


def test_the_finalists_evidence_is_that_of_one_evaluation_on_all_items(run, store, engine):
    made = run()
    from profiler.batches import encode_corpus

    stored, evidence = store.evaluations.list(made.id)[0]
    again = evaluate(engine, encode_corpus(engine, texts(2, 20)), stored.selection)
    assert evidence.accuracy == again.accuracy
    assert evidence.nll == pytest.approx(again.nll, rel=1e-6)
    assert evidence.coverage == pytest.approx(again.coverage, rel=1e-6)


def test_the_same_search_again_runs_nothing_and_another_gives_the_same_choice(run, store, monkeypatch, tmp_path):
    first = reasons_of(store, run().id)
    calls = []
    monkeypatch.setattr(search_module, "evaluate", lambda *each: calls.append(each) or evaluate(*each))
    assert reasons_of(store, run().id) == first
    assert calls == []
    run(keeps=(0.5, 0.25))
    assert len(reasons_of(store, run().id)) == 2
    assert calls


def test_a_profile_that_grows_knows_why_it_was_chosen_and_is_not_searched_again(
    engine, store, run, monkeypatch, tmp_path
):
    old = run()
    grown = profile_task(
        engine, store, TaskRecord("t"), texts(1, 8), None, embedder=HashEmbedder(),
        options=Options(scorers=["mone"], keeps=(0.5,), runs=tmp_path),
    )  # fmt: skip
    assert grown.id != old.id
    assert reasons_of(store, grown.id) == reasons_of(store, old.id)
    monkeypatch.setattr(search_module, "evaluate", lambda *each: pytest.fail("it was searched again"))
    assert run().id == grown.id
    assert len(reasons_of(store, grown.id)) == 1


def test_a_search_without_held_out_items_is_refused(engine, store, tmp_path):
    options = Options(runs=tmp_path, search=True)
    with pytest.raises(InvalidInput, match="give --eval"):
        profile_task(engine, store, TaskRecord("t"), texts(1, 4), None, embedder=HashEmbedder(), options=options)


def test_a_baseline_that_is_better_is_named_and_not_hidden():
    """The service never serves a baseline unasked, so the reason says what it would have given."""
    from profiler.halving import Outcome
    from store.records import Selection, StoredSelection

    def way(scorer: str) -> StoredSelection:
        return StoredSelection(scorer, "p", scorer, "uniform", 0.5, Selection.of([[0, 1]]))

    ranking = [(way("frequency"), Measured(10, 9, 10, 1.0, 10, 5)), (way("reap"), Measured(10, 7, 10, 3.0, 10, 5))]
    text = describe(0.5, Outcome(tuple(sorted(ranking, key=lambda pair: badness(pair[1]))), ((10, 2),)))
    assert text.startswith(
        "keep 0.5: reap with uniform, 7 of 10 right (40% to 89%), nll 0.300. Against frequency 9 of 10"
    )
