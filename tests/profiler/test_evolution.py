"""EEP's search: never worse than where it began, within bytes and floor, and the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler.corpus import Item, gather
from profiler.evaluate import Measured
from profiler.evolution import Room, evolve, grown, start_above
from profiler.halving import badness
from profiler.job import profile_task
from profiler.options import Options
from store.database import open_store
from store.records import Selection, TaskRecord

WANTED = Selection.of([[1, 4, 6], [0, 2, 7]])
ROOM = Room(experts=8, floor=2, costs=[1, 1], budget=6)


def overlap(selection: Selection) -> Measured:
    """Right where the selection has what is wanted."""
    right = len(set(selection) & set(WANTED))
    return Measured(6, right, 6, float(6 - right), 6, 6.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 40))
def test_the_result_is_never_worse_than_the_start_within_bytes_and_floor_and_the_same_again(seed, evaluations):
    draw = np.random.default_rng(seed)
    start = [Selection.of([draw.permutation(8)[:3].tolist(), draw.permutation(8)[:2].tolist()]) for _ in range(3)]
    costs = draw.integers(1, 5, size=2).tolist()
    room = Room(8, 2, costs, 3 * costs[0] + 2 * costs[1])
    seen = []

    def fitness(selection):
        seen.append(selection)
        return overlap(selection)

    found = evolve(start, room, evaluations, fitness)
    assert badness(overlap(found)) <= min(badness(overlap(one)) for one in start)
    assert all(room.holds(one.experts) and min(len(ids) for ids in one.experts) >= 2 for one in seen)
    assert evolve(start, room, evaluations, overlap) == found


def test_layers_share_out_their_bytes_anew_where_that_is_fitter():
    """All that is wanted lies in the first layer, and every start has equal layers."""
    aim = Selection.of([[0, 1, 2, 3], [0, 1]])

    def fitness(selection):
        right = len(set(selection) & set(aim))
        return Measured(6, right, 6, float(6 - right), 6, 6.0)

    assert evolve([Selection.of([[0, 4, 5], [0, 6, 7]])], ROOM, 600, fitness) == aim


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_more_bytes_never_make_the_fittest_less_fit(seed):
    """Each larger size starts from fixed sets, and from what the size below it found."""
    draw = np.random.default_rng(seed)
    worth = draw.normal(size=(2, 8))  # some experts do harm, so a larger set may be a worse one

    def fitness(selection):
        return Measured(1, 0, 1, -float(sum(worth[layer, expert] for layer, expert in selection)), 1, 1.0)

    found, before = None, None
    for count in (2, 3, 5, 7):
        start = [Selection.of([draw.permutation(8)[:count].tolist() for _ in range(2)]) for _ in range(2)]
        start = start if found is None else start_above(found, start)
        found = evolve(start, Room(8, 2, [1, 1], 2 * count), 10, fitness)
        now = badness(fitness(found))
        assert before is None or now <= before
        before = now


def test_it_finds_what_is_wanted_and_tries_no_set_twice():
    tried = []

    def counted(selection):
        tried.append(selection)
        return overlap(selection)

    start = [Selection.of([[0, 2, 3], [1, 3, 4]])]
    assert evolve(start, ROOM, 400, counted) == WANTED
    assert len(tried) == len(set(tried)) <= 401


def test_where_every_expert_stays_there_is_nothing_to_swap():
    whole = Selection.whole(2, 4)
    assert evolve([whole], Room(4, 1, [1, 1], 8), 10, overlap) == whole


def test_a_larger_size_starts_with_what_the_smaller_one_found():
    large = Selection.of([[0, 1, 2], [4, 5, 6]])
    found = grown(Selection.of([[6, 7], [5, 7]]), large)
    assert found.experts == ((0, 6, 7), (4, 5, 7))
    assert grown(Selection.of([[0, 1, 2, 3], [1]]), large).experts == ((0, 1, 2), (1, 4, 5))


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = write_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"), seed=3)
    with Engine.open(EngineConfig(folder, max_context=128, max_batch=16)) as opened:
        yield opened


def test_a_profile_stores_it_with_evidence_from_items_that_it_was_not_bred_on(engine, tmp_path):
    texts = [gather([Item(f"{name} {n}", "yes") for n in range(count)]) for name, count in (("c", 8), ("e", 4))]
    options = Options(scorers=["gate", "reap"], keeps=(1.0, 0.5), rows=16, runs=tmp_path, evolve=12, draws=1)
    with open_store(f"sqlite:///{tmp_path}/store.db") as store:
        made = profile_task(engine, store, TaskRecord("t"), *texts, embedder=HashEmbedder(), options=options)
        [stored] = [one for one in store.selections.find(made.id) if one.scorer == "eep"]
        assert (stored.allocator, stored.keep) == ("evolved", 0.5)  # all experts are all experts
        assert len(stored.selection) == 12
        evidence = store.evaluations.find(stored.id)
        assert evidence is not None
        assert evidence.evaluation_hash == texts[1].content_hash
        prices = {store.selections.get(one.selection).scorer: len(one.draws) for one in store.prices.list(made.id)}
        assert prices.get("eep", 0) == 0  # another text would breed another set: there is no formula to draw with
        assert len(prices) in (1, 2)
        again = profile_task(engine, store, TaskRecord("t"), *texts, embedder=HashEmbedder(), options=options)
        assert again.id == made.id
        assert len([one for one in store.selections.find(made.id) if one.scorer == "eep"]) == 1
