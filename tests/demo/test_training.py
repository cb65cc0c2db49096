"""The training's parts against slow, plain versions of themselves."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from demo.batches import Batch, batches
from demo.recipe import Recipe
from demo.specialise import routing_losses
from demo.tasks.registry import TASKS
from demo.tokenizer import train_tokenizer
from demo.train import rate

SMALL = replace(Recipe(), rows=12, row_tokens=96)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(vocabulary=600, items_per_task=50)


@pytest.fixture(scope="module")
def batch(tokenizer: PreTrainedTokenizerFast) -> Batch:
    return next(batches(tokenizer, SMALL, 0))


def test_a_row_holds_whole_examples_of_one_task(tokenizer: PreTrainedTokenizerFast, batch: Batch) -> None:
    for row in batch.ids.tolist():
        text = tokenizer.decode(row)
        assert text.count("<|user|>") == text.count("<|assistant|>") == text.count("<|end|>") >= 1
    assert batch.ids.shape == (12, 96)
    assert len(TASKS) == 10


def test_no_example_sees_another_and_none_sees_its_future(batch: Batch) -> None:
    for row in range(3):
        example, number = [], 0
        for token in batch.ids[row].tolist():
            number += token == 1  # <|user|> begins one
            example.append(0 if token == 0 else number)
        for query, key in itertools.product(range(96), repeat=2):
            if example[query] or example[key]:
                assert bool(batch.mask[row, 0, query, key]) == (key <= query and example[query] == example[key])


def test_positions_begin_anew_with_every_example(batch: Batch) -> None:
    starts = batch.ids == 1
    assert (batch.positions[starts] == 0).all()
    inside = (batch.ids[:, 1:] != 0) & ~starts[:, 1:]
    assert (batch.positions[:, 1:][inside] == batch.positions[:, :-1][inside] + 1).all()


def test_only_the_answer_and_its_end_count_in_full(tokenizer: PreTrainedTokenizerFast, batch: Batch) -> None:
    ids, weights = batch.ids[0].tolist(), batch.weights[0].tolist()
    answering = False
    for token, weight in zip(ids, weights, strict=True):
        expected = 1.0 if answering else 0.0 if token in (0, 1) else SMALL.prompt_weight
        assert weight == pytest.approx(expected), tokenizer.decode([token])
        answering = (answering or token == 2) and token != 3  # from <|assistant|> up to <|end|>


def test_a_resumed_run_sees_the_same_text(tokenizer: PreTrainedTokenizerFast) -> None:
    straight = list(itertools.islice(batches(tokenizer, SMALL, 0), 3))
    resumed = next(batches(tokenizer, SMALL, 2))
    assert torch.equal(straight[2].ids, resumed.ids)
    assert not torch.equal(straight[1].ids, resumed.ids)


def test_routing_losses_equal_plain_loops() -> None:
    torch.manual_seed(1)
    rows, length, experts = 3, 5, 4
    logits = torch.randn(rows * length, experts)
    valid = torch.ones(rows, length)
    valid[1, 3:] = 0
    row, batch, z = routing_losses([logits], valid)
    use = []
    for b in range(rows):
        counted = [logits[b * length + t].softmax(-1) for t in range(length) if valid[b, t]]
        use.append(sum(counted[1:], counted[0]) / len(counted))
    plain = sum(-sum(float(p) * math.log(float(p)) for p in each) for each in use) / rows
    mean = [float(sum(each[e] for each in use)) / rows for e in range(experts)]
    assert float(row) == pytest.approx(plain, rel=1e-4)
    assert float(batch) == pytest.approx(-sum(p * math.log(p) for p in mean), rel=1e-4)
    assert float(z) == pytest.approx(float(logits.logsumexp(-1).square().mean()), rel=1e-4)


def test_rows_of_one_expert_each_have_no_entropy_and_the_batch_has_all() -> None:
    logits = torch.full((4 * 2, 4), -30.0)
    for place in range(8):
        logits[place, place // 2] = 30.0
    row, batch, _ = routing_losses([logits], torch.ones(4, 2))
    assert float(row) == pytest.approx(0, abs=1e-4)
    assert float(batch) == pytest.approx(math.log(4), rel=1e-4)


def test_the_rate_rises_then_falls_to_its_share() -> None:
    recipe = Recipe()
    rates = [rate(step, recipe) for step in range(recipe.steps + 1)]
    assert rates[0] < 0.02
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (recipe.warmup - 1, recipe.warmup)
    assert rates[-1] == pytest.approx(recipe.final_share)
