"""Fewer calls a token, shared out to the layers: LExI's program, its errors, and what the job stores and measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler.batches import encode_corpus
from profiler.calls import INPUTS, RULES, SEED, Errors, budget_of, measure_errors, share_out
from profiler.corpus import Corpus, Item
from profiler.evaluate import evaluate
from profiler.job import profile_task
from profiler.options import Options
from store.database import Store, open_store
from store.errors import InvalidInput, UnsupportedFamily
from store.records import Profile, TaskRecord

TASK = TaskRecord("t")
CALIBRATION = Corpus(tuple(Item(f"item {n} of the text", f"is {n}") for n in range(6)), "calibration")
HELD_OUT = Corpus(tuple(Item(f"another {n} to look at", f"was {n}") for n in range(4)), "held out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("qwen3_moe", tmp_path_factory.mktemp("m"), seed=3, num_experts_per_tok=4)


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.open(EngineConfig(folder, max_context=64, max_batch=4, threads=1)) as opened:
        yield opened


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(f"sqlite:///{tmp_path}/s.db") as opened:
        yield opened


def options(tmp_path: Path, **named: object) -> Options:
    return replace(
        Options(scorers=["gate", "random"], keeps=(1.0, 0.5), runs=tmp_path / "runs", active=(0.5,)), **named
    )


def made(engine: Engine, store: Store, chosen: Options, held_out: Corpus | None = HELD_OUT) -> Profile:
    return profile_task(engine, store, TASK, CALIBRATION, held_out, embedder=HashEmbedder(), options=chosen)


def test_calls_are_shared_out_as_trying_everything_does() -> None:
    example = np.array([[9, 4, 0], [3, 1, 0], [1, 0.5, 0]])
    assert [share_out(example, budget) for budget in (5, 6, 7)] == [(3, 1, 1), (3, 2, 1), (3, 3, 1)]
    draw = np.random.default_rng(5)
    for budget in (4, 7, 11, 12):
        errors = -np.sort(-draw.random((4, 3)), axis=1)
        tried = [each for each in product((1, 2, 3), repeat=4) if sum(each) == budget]
        assert share_out(errors, budget) == min(
            tried, key=lambda each: sum(errors[layer, count - 1] for layer, count in enumerate(each))
        )


def test_equal_layers_differ_by_one_call_at_most_and_loud_layers_take_more_by_lexi_alone() -> None:
    errors = Errors(np.array([[3.0, 1, 0], [3, 1, 0], [300, 100, 0]]), np.array([3.0, 3, 300]))
    assert sorted(share_out(RULES["equal"](errors), 7)) == [2, 2, 3]
    assert share_out(RULES["lexi"](errors), 5) == (1, 1, 3)
    assert share_out(RULES["lexi_shares"](errors), 6) == (2, 2, 2)


@pytest.mark.parametrize("renormalised", [True, False])
def test_errors_are_those_of_the_stock_model_s_layers_with_another_top_k(renormalised: bool, tmp_path: Path) -> None:
    folder = write_tiny("qwen3_moe", tmp_path / "m", num_experts_per_tok=4, norm_topk_prob=renormalised)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    noise = torch.Generator().manual_seed(SEED)
    wanted, sizes = np.zeros((3, 4)), np.zeros(3)
    for at, layer in enumerate(model.model.layers):
        x = torch.randn(1, INPUTS, 32, generator=noise)
        with torch.inference_mode():
            whole = layer.mlp(x)
            sizes[at] = float(whole.norm())
            for calls in (1, 2, 3):
                layer.mlp.gate.top_k = calls
                wanted[at, calls - 1] = float((layer.mlp(x) - whole).norm())
    with Engine.open(EngineConfig(folder, threads=1)) as engine:
        found = measure_errors(engine)
    assert found.absolute == pytest.approx(wanted, rel=1e-4)
    assert found.outputs == pytest.approx(sizes, rel=1e-4)
    assert found.shares == pytest.approx(wanted / sizes[:, None], rel=1e-4)


def test_the_best_selection_of_each_size_is_measured_with_fewer_calls_by_every_rule(
    engine: Engine, store: Store, tmp_path: Path
) -> None:
    profile = made(engine, store, options(tmp_path))
    found = {(one.keep, one.calls_by): (one, e) for one, e in store.evaluations.list(profile.id) if one.active < 1}
    assert set(found) == {(keep, rule) for keep in (1.0, 0.5) for rule in RULES}
    held_out = encode_corpus(engine, HELD_OUT)
    for stored, evidence in found.values():
        assert stored.scorer == "gate"
        assert (stored.active, sum(stored.selection.calls or ())) == (0.5, 6)
        again = evaluate(engine, held_out, stored.selection)
        assert (evidence.accuracy, evidence.levels) == (again.accuracy, tuple(sorted(again.levels)))
        assert evidence.nll == pytest.approx(again.nll, rel=1e-4)
    whole = next(e for one, e in store.evaluations.list(profile.id) if one.keep == 1 and one.active == 1)
    assert found[1.0, "equal"][1].nll != pytest.approx(whole.nll, rel=1e-3)


def test_a_second_run_measures_nothing_again(
    engine: Engine, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = made(engine, store, options(tmp_path))
    before = sorted((one.id, e.nll) for one, e in store.evaluations.list(profile.id))
    monkeypatch.setattr("profiler.calls.measure_errors", None)
    made(engine, store, options(tmp_path))
    assert sorted((one.id, e.nll) for one, e in store.evaluations.list(profile.id)) == before


def test_each_size_has_a_price_with_all_calls_and_one_with_fewer(engine: Engine, store: Store, tmp_path: Path) -> None:
    profile = made(engine, store, options(tmp_path, draws=2))
    stored = {one.id: one for one in store.selections.find(profile.id)}
    prices = {(stored[one.selection].keep, stored[one.selection].active): one for one in store.prices.list(profile.id)}
    assert set(prices) == {(1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (0.5, 0.5)}
    assert prices[0.5, 0.5].bytes == prices[0.5, 1.0].bytes  # fewer calls free no memory
    assert len(prices[0.5, 0.5].draws) == 2
    assert prices[0.5, 0.5].draws != prices[0.5, 1.0].draws


def test_shares_that_can_t_be_had_are_refused_before_the_pass(
    engine: Engine, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for share, why in ((1.0, "below 1"), (0.1, "at least 0.25"), (float("nan"), "got nan")):
        with pytest.raises(InvalidInput, match=why):
            made(engine, store, options(tmp_path, active=(share,)))
    with pytest.raises(InvalidInput, match="one call a layer"):
        budget_of(0.5, 3, top_k=1)
    with pytest.raises(InvalidInput, match="--eval"):
        made(engine, store, options(tmp_path), held_out=None)
    monkeypatch.setattr(engine.board, "fewer", False)
    with pytest.raises(UnsupportedFamily, match="--active"):
        made(engine, store, options(tmp_path))
    assert store.profiles.list() == []
