"""Rules that run fewer experts, against slow references on random routing and against the papers' small examples."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from benchmarks.routing_rules import (
    RuleRow,
    _Model,
    bench_rules,
    fewer,
    lexi_errors,
    pesf,
    rule_means,
    skipping,
)
from demo.prepare import corpus
from engine.config import EngineConfig
from engine.engine import Engine
from profiler.batches import encode_corpus
from profiler.calls import share_out
from profiler.progress import ignore
from store.home import bundled_model

ROWS, LENGTH, EXPERTS, SLOTS = 3, 7, 12, 4
TOKENS = ROWS * LENGTH


@pytest.fixture(params=range(3))
def routing(request):
    noise = torch.Generator().manual_seed(request.param)
    weights, index = torch.rand(TOKENS, EXPERTS, generator=noise).softmax(-1).topk(SLOTS)
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=noise)
    return weights, index, torch.arange(LENGTH) < lengths


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_pesf_drops_what_each_prompt_hardly_used_and_nothing_of_the_answer(routing, alpha):
    weights, index, prompt = routing
    found = pesf(alpha, EXPERTS)(0, weights, index, prompt)
    for row, place, slot in product(range(ROWS), range(LENGTH), range(SLOTS)):
        token = row * LENGTH + place
        mine = [row * LENGTH + at for at in range(LENGTH) if prompt[row, at]]
        count = sum(int(index[token, slot] in index[other]) for other in mine)
        dropped = bool(prompt[row, place]) and count < alpha * len(mine) * SLOTS / EXPERTS
        assert found[token, slot] == (0 if dropped else weights[token, slot])


def test_pesf_on_the_small_example_of_two_of_four_experts():
    """Four tokens, so the bound is alpha times 2: counts are 3, 2, 2, 1."""
    index = torch.tensor([[0, 1], [0, 2], [0, 1], [2, 3]])
    prompt = torch.ones(1, 4, dtype=torch.bool)
    found = {
        alpha: pesf(alpha, 4)(0, torch.ones(4, 2), index, prompt).eq(0).nonzero().tolist() for alpha in (0.3, 0.7, 1)
    }
    assert found == {0.3: [], 0.7: [[3, 1]], 1: [[3, 1]]}


def test_skipping_and_fewer_slots_keep_the_sum_and_drop_token_by_token(routing):
    weights, index, prompt = routing
    thresholds = torch.tensor([[0.0, 0.9, 0.8, 0.7]])
    skipped, cut = skipping(thresholds)(0, weights, index, prompt), fewer([2])(0, weights, index, prompt)
    for token in range(TOKENS):
        own = weights[token].tolist()
        for found, kept in [
            (skipped, [w >= beta * own[0] for w, beta in zip(own, thresholds[0].tolist(), strict=True)]),
            (cut, [True, True, False, False]),
        ]:
            left = sum(w for w, stays in zip(own, kept, strict=True) if stays)
            wanted = [w * sum(own) / left if stays else 0.0 for w, stays in zip(own, kept, strict=True)]
            assert found[token].tolist() == pytest.approx(wanted, rel=1e-5)


def test_rules_at_their_loosest_change_nothing(routing):
    weights, index, prompt = routing
    for rule in (pesf(0.0, EXPERTS), skipping(torch.zeros(1, SLOTS)), fewer([SLOTS])):
        torch.testing.assert_close(rule(0, weights, index, prompt), weights)


def test_means_are_over_tasks():
    rows = [RuleRow("a", "x", 1.0, 0.5, 4), RuleRow("a", "y", 0.5, 0.1, 4), RuleRow("b", "x", 0.0, 0.0, 4)]
    assert rule_means(rows) == [RuleRow("a", "mean", 0.75, pytest.approx(0.3), 8), RuleRow("b", "mean", 0.0, 0.0, 4)]


def test_on_the_bundled_model_fewer_slots_save_the_calls_that_they_say():
    rows = {row.rule: row for row in bench_rules(["arithmetic"], 4, ignore)}
    assert rows["all"].calls_saved == 0
    assert rows["equal layers 0.5"].calls_saved == rows["lexi 0.5"].calls_saved == 0.5
    assert rows["pesf 0.3"].calls_saved <= rows["pesf 1"].calls_saved
    assert 0 < rows["naee, last slot"].calls_saved < rows["naee, all slots"].calls_saved < 0.75
    assert rows["all"].accuracy >= 0.5


def test_lexi_starves_the_bundled_models_first_layer_unless_errors_are_shares_of_the_output():
    """Half of the slots. The last layer writes most, so by plain norms it keeps all; at the end the first counts."""
    with Engine.open(EngineConfig(bundled_model(), max_context=256, dtype="float32", threads=1)) as engine:
        text = encode_corpus(engine, corpus("arithmetic", "calibration", 6))
    model = _Model(bundled_model())
    found = lexi_errors(model, model.noise(), text)
    for how, errors in found.items():
        assert errors.shape == (6, 4), how
        assert (errors[:, -1] == 0).all(), how
        assert (errors[:, 0] >= errors[:, 2]).all(), how
    assert share_out(found[""], 12) == (1, 1, 2, 2, 2, 4)
    assert share_out(found[", shares"], 12) == (2,) * 6
    assert found[", at the end"][:, 0].argmax() == 0


def test_the_inputs_of_a_layer_are_the_texts_own_and_its_error_is_worked_out_on_them():
    with Engine.open(EngineConfig(bundled_model(), max_context=256, dtype="float32", threads=1)) as engine:
        text = encode_corpus(engine, corpus("french", "calibration", 3))
    model = _Model(bundled_model())
    inputs = model.inputs(text)
    assert [len(each) for each in inputs] == [sum(len(one.tokens) for one in text)] * 6
    block = model._blocks[0]
    with torch.inference_mode():
        _, weights, index = block.gate(inputs[0])
        alone = torch.stack(
            [
                block.experts(x[None], i[None, :1], w.sum()[None, None])[0]
                for x, i, w in zip(inputs[0], index, weights, strict=True)
            ]
        )
        whole = block.experts(inputs[0], index, weights)
    errors, sizes = model.errors(inputs)
    assert errors[0, 0] == pytest.approx(float((alone - whole).norm()), rel=1e-4)
    assert sizes[0] == pytest.approx(float(whole.norm()), rel=1e-5)
