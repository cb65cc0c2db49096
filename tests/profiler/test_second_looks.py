"""What no single pass gives: every set of experts tried, windows of dropping, and importance learned by gradients."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from engine.card import ModelCard
from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.plan import plan_memory
from engine.tiny import write_tiny
from engine.tiny_quantised import write_fp8
from profiler import relaxation
from profiler.allocation import select
from profiler.batches import encode_corpus, pad
from profiler.corpus import Item, gather
from profiler.dropping import dropped, droppings
from profiler.enumeration import enumerations, losses, place
from profiler.extras import Needs
from profiler.job import profile_task
from profiler.options import Options
from profiler.sample import LayerSample, on_layers
from profiler.scorers.registry import SCORERS
from profiler.second_looks import announce
from profiler.statistics import Statistics
from store.checkpoint import CheckpointMap
from store.database import open_store
from store.errors import BudgetError, CheckpointError, InvalidInput, UnsupportedFamily
from store.records import Selection, TaskRecord

CORPUS = gather([Item(f"number {n} " + "and more " * (n % 4), "yes") for n in range(9)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture(scope="module")
def engine(model):
    with Engine.open(EngineConfig(model, max_context=128, max_batch=16)) as opened:
        yield opened


@pytest.fixture(scope="module")
def text(engine):
    return encode_corpus(engine, CORPUS)


def router(z: torch.Tensor, top_k: int):
    def route(tokens, experts):
        values, at = z[tokens][:, list(experts)].topk(top_k, dim=-1)
        return values.softmax(-1), torch.tensor(list(experts))[at]

    return route


def of_subsets(values: np.ndarray, top_k: int) -> Statistics:
    layers, sets = values.shape
    return Statistics.zeros(layers, sets.bit_length() - 1, top_k).with_extras({"subset_losses": values})


# --- every set -------------------------------------------------------------------------------------------------------


def test_naee_s_toy_layer_loses_what_was_worked_out_by_hand(toy):
    found = losses(LayerSample(toy.o, toy.weights, toy.index, router(toy.z, 2)))
    wanted = {(0, 1, 2): 0.7337, (0, 1, 3): 1.8541, (0, 2, 3): 6.0934, (1, 2, 3): 3.4882, (0, 1): 1.9940}
    np.testing.assert_allclose([found[place(kept)] for kept in wanted], list(wanted.values()), atol=1e-4)
    assert found[place((0, 1, 2, 3))] == pytest.approx(0.0, abs=1e-12)
    assert np.isinf(found[place((2,))])
    statistics = of_subsets(found[None], 2)
    scorer = SCORERS["naee_exact"]
    assert select(scorer, "uniform", statistics, 0.5).experts == ((0, 1),)
    assert select(scorer, "uniform", statistics, 0.75).experts == ((0, 1, 2),)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_set_is_never_worse_than_the_greedy_one(seed, random_trace):
    from profiler.elimination import order

    trace = random_trace(seed, tokens=12, experts=6, top_k=2)
    layer = LayerSample(trace.o, trace.weights, trace.index, router(trace.z, 2))
    found, ranking = losses(layer), order(*layer)
    statistics = of_subsets(found[None], 2)
    for count in range(2, 7):
        [best] = SCORERS["naee_exact"].pick(statistics, [count]).experts
        greedy = np.argsort(-ranking, kind="stable")[:count].tolist()
        assert found[place(best)] <= found[place(greedy)] + 1e-9
        assert found[place(best)] == min(found[place(kept)] for kept in combinations(range(6), count))


def test_sets_of_a_real_layer_lose_what_the_engine_gives_inside_them(engine, text):
    found = enumerations(engine, text, 16)
    assert found.shape == (engine.card.layers, 2**engine.card.experts)
    layer = next(iter(on_layers(engine, text, 16)))
    kept = (0, 3, 5)
    everyone = torch.arange(len(layer.outputs))
    weights, index = layer.route(everyone, kept)
    wanted, got = torch.zeros(2, len(layer.outputs), layer.outputs.shape[2], dtype=torch.float64)
    for slot in range(index.shape[1]):
        wanted += layer.weights[:, slot, None] * layer.outputs[everyone, layer.chosen[:, slot]]
        got += weights[:, slot, None] * layer.outputs[everyone, index[:, slot]]
    assert found[0, place(kept)] == pytest.approx(float((got - wanted).norm()), rel=1e-6)


def test_more_than_eight_experts_are_refused_before_anything_runs(engine):
    many = type("Engine", (), {"card": replace(engine.card, experts=64), "plan": engine.plan})()
    with pytest.raises(InvalidInput, match="at most 8 of them; this model has 64"):
        announce(many, frozenset({"subset_losses"}))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_outputs_that_are_no_numbers_are_refused_and_not_ranked(wrong, toy):
    """An expert that the text never reached is tried all the same."""
    from profiler.elimination import order

    outputs = toy.o.clone()
    outputs[:, 3, 1] = wrong
    layer = LayerSample(outputs, toy.weights, toy.index, router(toy.z, 2))
    with pytest.raises(CheckpointError, match="expert 3 are not finite"):
        losses(layer)
    with pytest.raises(CheckpointError, match="expert 3 are not finite"):
        order(*layer)


# --- windows ---------------------------------------------------------------------------------------------------------


def test_the_published_window_drops_the_weak_and_then_nobody():
    """Toy-4: shares .403 .417 .113 .067, a fifth is the threshold; of two alive at .5 none is below .4."""
    alive = np.array([True] * 4)
    assert dropped(np.array([0.403, 0.417, 0.113, 0.067]), alive, 1) == [3]  # two are weak, one in four may go
    assert dropped(np.repeat([0.06, 0.02], 16) / 1.28, np.ones(32, bool), 4) == list(range(31, 23, -1))
    assert dropped(np.full(32, 1 / 32), np.ones(32, bool), 4) == [31, 30]  # nobody is weak: a sixteenth goes
    assert dropped(np.array([0.6, 0.4, 0.0, 0.0]), np.array([True, True, False, False]), 2) == []


def test_who_is_dropped_never_returns_and_the_last_share_orders_the_rest(engine, text, monkeypatch):
    from profiler import dropping

    seen = []
    real = dropping._shares

    def watched(engine, text, rows, alive):
        shares = real(engine, text, rows, alive)
        seen.append((alive.copy(), shares))
        return shares

    monkeypatch.setattr(dropping, "_shares", watched)
    found = droppings(engine, text, 16)
    top_k = engine.card.top_k
    for (before, shares), (after, _) in pairwise(seen):
        assert (after <= before).all()
        assert (before.sum(axis=1) - after.sum(axis=1) >= 1).any()
        assert np.allclose(shares.sum(axis=1), 1)
        assert (shares[~before] == 0).all()  # the router gives the dead nothing
    assert (seen[-1][0].sum(axis=1) == top_k).all()
    last = np.argsort(-found, axis=1)[:, :top_k]
    assert all(set(row) == set(np.flatnonzero(alive)) for row, alive in zip(last.tolist(), seen[-1][0], strict=True))


def test_later_windows_see_where_the_dropped_experts_tokens_went(engine, text):
    """Else the order would be that of `gate`, and windows for nothing."""
    gate = np.argsort(-SCORERS["gate"].score(_statistics(engine, text)), axis=1)
    assert (np.argsort(-droppings(engine, text, 16), axis=1) != gate).any()


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_the_gradient_is_that_of_the_loss(family, tmp_path):
    folder = write_tiny(family, tmp_path / family, seed=5)
    with Engine.open(EngineConfig(folder, max_context=128, max_batch=16, dtype="float32")) as opened:
        model, routers = relaxation._open(opened)
        batch = pad(encode_corpus(opened, CORPUS)[:4])
        relaxed = relaxation.Relaxed(opened.card.layers, opened.card.experts, opened.device)
    model.double()
    draw = torch.Generator().manual_seed(5)  # a step across which a token changes its expert has no slope
    relaxed.alpha.data = torch.randn(relaxed.alpha.shape, dtype=torch.float64, generator=draw) * 0.3
    relaxed.beta.data = relaxed.beta.data.double() * 1.1
    for layer, module in enumerate(routers):
        relaxed.watch(layer, module)
    relaxation.loss(model, relaxed, batch).backward()
    for parameter in (relaxed.alpha, relaxed.beta):
        flat, slopes = parameter.data.view(-1), parameter.grad.view(-1)
        for at in (0, len(flat) - 1):
            sides = []
            for step in (1e-3, -1e-3):
                flat[at] += step
                sides.append(relaxation.loss(model, relaxed, batch).item())
                flat[at] -= step
            # The loss is computed in float32, as the model's logits are.
            assert (sides[0] - sides[1]) / 2e-3 == pytest.approx(float(slopes[at]), abs=2e-3)


def test_identical_experts_stay_equally_important(engine, text):
    model, routers = relaxation._open(engine)
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            for name in ("gate_up_proj", "down_proj"):
                weight = getattr(module, name).data
                weight[:] = weight[:1]
    relaxed = relaxation.Relaxed(engine.card.layers, engine.card.experts, engine.device)
    for layer, module in enumerate(routers):
        relaxed.watch(layer, module)
        module.weight.data.zero_()  # every expert is liked alike
    relaxation.loss(model, relaxed, pad(text)).backward()
    spread = relaxed.alpha.grad - relaxed.alpha.grad.mean(dim=1, keepdim=True)
    seen = relaxed.alpha.grad.abs().max()
    top = spread[:, : engine.card.top_k]  # of equal logits the first K are chosen
    assert float((top - top[:, :1]).abs().max()) <= 1e-4 * max(1.0, float(seen))


def test_learning_lowers_the_loss_and_is_repeatable(engine, text):
    def run():
        model, routers = relaxation._open(engine)
        relaxed = relaxation.Relaxed(engine.card.layers, engine.card.experts, engine.device)
        for layer, module in enumerate(routers):
            relaxed.watch(layer, module)
        batches = [pad(text)]
        before = relaxation.loss(model, relaxed, batches[0]).item()
        relaxation.train(model, relaxed, batches)
        return before, relaxation.loss(model, relaxed, batches[0]).item(), relaxed.importance().detach()

    before, after, importance = run()
    assert after < before
    assert torch.equal(importance, run()[2])
    assert (importance > 0).all()
    assert not torch.allclose(importance, torch.ones_like(importance), atol=1e-3)


def test_a_budget_that_can_not_hold_a_second_model_is_refused_before_the_pass(model, engine):
    needs: Needs = frozenset({"relaxation"})
    [said] = announce(engine, needs)
    assert "second copy of the model" in said
    whole = plan_memory(engine.card, EngineConfig(model, memory=1 << 30, max_context=128)).memory_for(1.0)
    with (
        Engine.open(EngineConfig(model, memory=whole, max_context=128)) as tight,
        pytest.raises(BudgetError, match="gradients through a second copy"),
    ):
        announce(tight, needs)


# --- all of them, through the job ------------------------------------------------------------------------------------


def test_a_profile_keeps_them_and_serves_by_them(engine, tmp_path, caplog):
    options = Options(
        scorers=["naee_exact", "tsep", "diep"],
        allocators=["uniform", "lexi", "diep"],
        keeps=(0.5,),
        rows=16,
        runs=tmp_path / "runs",
    )
    with open_store(f"sqlite:///{tmp_path}/store.db") as store:
        made = profile_task(engine, store, TaskRecord("t"), CORPUS, None, embedder=HashEmbedder(), options=options)
        stored = store.selections.find(made.id)
    assert "second copy of the model" in caplog.text
    assert {"subset_losses", "dropping", "relaxation", "elimination"} <= set(made.statistics)
    assert {(one.scorer, one.allocator) for one in stored} == {
        (scorer, allocator) for scorer in options.scorers for allocator in options.allocators
    }
    assert all(engine.plan.fits(one.selection) for one in stored)
    assert {type(one.selection) for one in stored} == {Selection}


def _statistics(engine, text):
    from profiler.channels.accumulator import make_accumulator

    accumulator = make_accumulator(engine, frozenset())
    batch = pad(text)
    accumulator.begin(batch.roles, batch.halves)
    engine.forward(batch.ids, batch.mask, [None] * len(text), accumulator)
    return accumulator.statistics()


@pytest.mark.parametrize("need", ["relaxation", "channel_gradients"])
def test_a_quantised_checkpoint_has_no_gradients_and_is_refused_before_the_pass(need, tmp_path):
    folder = write_fp8(write_tiny("deepseek_v3", tmp_path / "m", seed=3))
    with (
        Engine.open(EngineConfig(folder, max_context=128, max_batch=8)) as engine,
        pytest.raises(UnsupportedFamily, match="this checkpoint is quantised"),
    ):
        announce(engine, frozenset({need}))


@pytest.mark.parametrize("need", ["relaxation", "channel_gradients"])
def test_the_second_copy_has_to_fit_beside_the_engine(need, model):
    config = EngineConfig(model, memory=1 << 40, max_context=128, max_batch=8)
    plan = plan_memory(ModelCard.read(model), config)
    copy = plan.dense_bytes + plan.layers * plan.experts * plan.slot_bytes
    for spare, refused in ((-1, True), (0, False)):
        budget = replace(plan, budget=plan.total_bytes + copy + spare)
        engine = type("Engine", (), {"checkpoint": CheckpointMap.open(model), "plan": budget})()
        with pytest.raises(BudgetError, match="beside the engine's") if refused else nullcontext():
            announce(engine, frozenset({need}))
