"""NAEE's loss by hand and against brute force, and greedy elimination on tiny models of every family."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.tiny import FAMILIES, write_tiny
from profiler.batches import encode_corpus
from profiler.corpus import Item, gather
from profiler.elimination import answer_eliminations, eliminations, order
from profiler.job import profile_task
from profiler.options import Options
from store.database import open_store
from store.records import TaskRecord

CORPUS = gather([Item(f"number {n} " + "and more " * (n % 4), "yes") for n in range(9)])


def router(z: torch.Tensor, top_k: int):
    """A softmax router over the experts that are left, renormalised."""

    def route(tokens, experts):
        values, at = z[tokens][:, list(experts)].topk(top_k, dim=-1)
        return values.softmax(-1), torch.tensor(list(experts))[at]

    return route


def loss_of(trace, kept) -> float:
    """The squared error of the layer's output when only `kept` are there, token by token."""
    total = 0.0
    for t in range(len(trace.z)):
        whole = sum(w * trace.o[t, e] for w, e in zip(trace.weights[t], trace.index[t].tolist(), strict=True))
        ids = sorted(kept, key=lambda e, t=t: -float(trace.z[t, e]))[: trace.top_k]
        weights = torch.softmax(trace.z[t, ids], 0)
        total += float((sum(w * trace.o[t, e] for w, e in zip(weights, ids, strict=True)) - whole).square().sum())
    return total


def test_the_toy_layer_drops_as_worked_out_by_hand(toy):
    """Norms, not squared, over the one batch: without 3 the loss is .7337, without 2 and 3 it is 1.9940."""
    found = order(toy.o, toy.weights, toy.index, router(toy.z, 2))
    whole = (toy.o * toy.dense_weights[:, :, None]).sum(1).square().sum()
    np.testing.assert_allclose(np.sqrt(found[[3, 2]] * float(whole)), [0.7337, 1.9940], atol=1e-4)
    assert np.argsort(-found, kind="stable").tolist() == [0, 1, 2, 3]
    losses = {kept: loss_of(toy, kept) for kept in combinations(range(4), 3)}
    np.testing.assert_allclose(
        np.sqrt([losses[kept] for kept in [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)]]),
        [0.7337, 1.8541, 6.0934, 3.4882],
        atol=1e-4,
    )


@pytest.mark.parametrize("seed", range(4))
def test_every_step_drops_the_expert_that_costs_least(seed, random_trace):
    trace = random_trace(seed, tokens=12, experts=6, top_k=2)
    found = order(trace.o, trace.weights, trace.index, router(trace.z, 2))
    left = list(range(6))
    for expert in np.argsort(found, kind="stable")[:4].tolist():
        costs = {other: loss_of(trace, [e for e in left if e != other]) for other in left}
        assert costs[expert] == pytest.approx(min(costs.values()))
        left.remove(expert)
    assert len({found[e] for e in left}) == 1


def test_experts_that_no_token_wants_cost_nothing_and_go_first(random_trace):
    trace = random_trace(1, experts=6, top_k=2)
    trace.z[:, [1, 4]] = -50.0
    weights, index = trace.z.topk(2)
    found = order(trace.o, weights.softmax(-1), index, router(trace.z, 2))
    assert sorted(np.argsort(found)[:2].tolist()) == [1, 4]
    assert found[[1, 4]].max() < 1e-8 < np.delete(found, [1, 4]).min()


def test_a_twin_costs_nothing(random_trace):
    """Two experts that do the same and are liked the same: the second is free to go."""
    trace = random_trace(2, experts=6, top_k=1)
    trace.o[:, 4], trace.z[:, 4] = trace.o[:, 2], trace.z[:, 2] - 1e-9
    weights, index = trace.z.topk(1)
    found = order(trace.o, weights.softmax(-1), index, router(trace.z, 1))
    assert min(found[2], found[4]) < 1e-8


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sample_is_routed_and_run_as_the_model_does(family, tmp_path):
    """All that the layer gives is accounted for: the target of the greedy search is the model's own output."""
    with Engine.open(EngineConfig(write_tiny(family, tmp_path, seed=5), max_context=128, max_batch=8)) as engine:
        text = encode_corpus(engine, CORPUS)
        found = eliminations(engine, text, 4)
        again = eliminations(engine, text, 4)
        seen = {}

        class Watch:
            def residual(self, layer, h): ...
            def experts(self, layer, experts, tokens, weights, outputs): ...
            def routed(self, layer, x, logits, weights, index, valid):
                seen[layer] = x, logits, weights, index.long()

            def combined(self, layer, y):
                x, logits, weights, index = seen[layer]
                outputs = engine.layers.expert_outputs(layer, x)
                own = (outputs.gather(1, index[:, :, None].expand(-1, -1, x.shape[1])) * weights[:, :, None]).sum(1)
                torch.testing.assert_close(own.to(y.dtype), y, rtol=1e-4, atol=1e-5)
                again, ids = engine.layers.route_within(layer, x, logits, range(engine.card.experts))
                assert ids.sort(-1).values.equal(index.sort(-1).values)
                torch.testing.assert_close(again.sort(-1).values, weights.sort(-1).values)

        ids = torch.tensor([text[0].tokens])
        engine.forward(ids, torch.ones_like(ids), [None], Watch())
        assert len(seen) == engine.card.layers
    np.testing.assert_array_equal(found, again)
    assert np.isfinite(found).all()
    assert ((found == found.max(axis=1, keepdims=True)).sum(axis=1) == 2).all()  # top-2: two stay to the end


def test_answers_alone_are_tried_on_their_own_tokens_and_a_text_without_any_on_all(tmp_path):
    """The plain way: look at every response token in one forward an item, and drop experts on those."""
    with Engine.open(EngineConfig(write_tiny("olmoe", tmp_path, seed=5), max_context=128, max_batch=8)) as engine:
        text = encode_corpus(engine, CORPUS)
        seen = [[] for _ in range(engine.card.layers)]

        class Watch:
            def residual(self, layer, h): ...
            def experts(self, layer, experts, tokens, weights, outputs): ...
            def combined(self, layer, y): ...
            def routed(self, layer, x, logits, weights, index, valid):
                seen[layer].append([each[start:] for each in (x, logits, weights, index.long())])

        for one in sorted(text, key=lambda one: (len(one.tokens), one.number)):
            start = len(one.prompt)
            ids = torch.tensor([one.tokens])
            engine.forward(ids, torch.ones_like(ids), [None], Watch())
        wanted = []
        for layer, parts in enumerate(seen):
            x, logits, weights, index = (torch.cat(each) for each in zip(*parts, strict=True))
            assert len(x) == sum(len(one.response) for one in text)

            def route(tokens, experts, layer=layer, x=x, logits=logits):
                return engine.layers.route_within(layer, x[tokens], logits[tokens], experts)

            wanted.append(order(engine.layers.expert_outputs(layer, x), weights, index, route))
        np.testing.assert_allclose(answer_eliminations(engine, text, 4), wanted, rtol=1e-3, atol=1e-6)
        assert not np.allclose(wanted, eliminations(engine, text, 4), rtol=1e-2)
        silent = encode_corpus(engine, gather([Item(item.prompt) for item in CORPUS.items]))
        np.testing.assert_array_equal(answer_eliminations(engine, silent, 4), eliminations(engine, silent, 4))


@pytest.mark.parametrize(("scorer", "statistic"), [("naee", "elimination"), ("naee_answers", "answer_elimination")])
def test_a_profile_for_naee_says_so_in_its_statistics(tmp_path, scorer, statistic):
    folder = write_tiny("olmoe", tmp_path / "m", seed=5)
    options = Options(scorers=[scorer], keeps=(0.5,), rows=4, runs=tmp_path / "runs")
    with (
        Engine.open(EngineConfig(folder, max_context=128, max_batch=8)) as engine,
        open_store(f"sqlite:///{tmp_path}/s.db") as store,
    ):
        made = profile_task(engine, store, TaskRecord("t"), CORPUS, None, embedder=HashEmbedder(), options=options)
        [stored] = store.selections.find(made.id)
    for layer, ids in enumerate(stored.selection.experts):
        assert set(np.argsort(-made.statistics[statistic][layer])[:4].tolist()) == set(ids)
