"""Evidence: exact match of greedy answers, likelihood against plain transformers, coverage of the selection."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.requests import FinishedEvent, Served
from engine.tiny import write_tiny
from profiler.batches import encode_corpus, pad, shards
from profiler.corpus import Item, gather
from profiler.evaluate import evaluate
from store.errors import BudgetError, InvalidInput
from store.records import Selection

ITEMS = [Item(f"query {n} " + "x" * n, "yes" if n % 2 else "certainly not", line=n) for n in range(1, 8)]
HALF = Selection.of([[0, 2, 4, 6], [1, 2, 3, 4], [0, 1, 6, 7]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"), seed=8)


@pytest.fixture(scope="module")
def engine(model):
    with Engine.open(EngineConfig(model, max_context=96, max_batch=8)) as opened:
        yield opened


@pytest.fixture(scope="module")
def text(engine):
    return encode_corpus(engine, gather(ITEMS))


def answer(monkeypatch, engine, say) -> list:
    """Let `say(prompt)` decide what a row's answer is; returns the requests as they come."""
    asked = []

    def generate(requests):
        asked.extend(requests)
        for row, request in reversed(list(enumerate(requests))):
            said = say(engine.tokenizer.decode(request.prompt))
            yield FinishedEvent(row, "stop", said, len(request.prompt), 1, Served("mask", 0.25, 1, 0, 0, 0, 0, 0))

    monkeypatch.setattr(engine, "generate", generate)
    return asked


def test_an_answer_counts_if_it_is_the_response_but_for_spaces_around(engine, text, monkeypatch):
    answers = {1: " yes\n", 2: "certainly not", 3: "Yes", 4: "certainly", 5: "yes, sir", 6: "certainly not", 7: "yes"}
    asked = answer(monkeypatch, engine, lambda prompt: answers[int(prompt.split("query ")[1][0])])
    measured = evaluate(engine, text, HALF, rows=3)
    assert measured.accuracy == pytest.approx(4 / 7)
    assert measured.coverage == pytest.approx(0.25)
    assert measured.items == 7
    # Under a guard that never rings: it meters the level of every item.
    assert {(request.selection, request.mode, request.sampling.temperature) for request in asked} == {(HALF, "auto", 0)}
    # Room beyond the response, so that an answer that does not end there shows.
    assert all(request.sampling.max_tokens > len("yes") for request in asked)


def test_items_without_a_response_have_no_accuracy_but_a_likelihood_and_a_coverage(engine):
    measured = evaluate(engine, encode_corpus(engine, gather([Item("some text"), Item("some more")])), HALF)
    assert measured.accuracy is None
    assert measured.nll > 0
    assert 0 < measured.coverage < 1


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_the_likelihood_is_that_of_the_plain_model_in_any_batching(rows, model, engine, text):
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for one in text:
        with torch.inference_mode():
            scores = plain(torch.tensor([one.tokens])).logits[0].double().log_softmax(-1)  # [S, V]
        for place in range(len(one.prompt), len(one.tokens)):
            total -= float(scores[place - 1, one.tokens[place]])
            count += 1
    measured = evaluate(engine, text, None, rows=rows)
    assert measured.nll == pytest.approx(total / count, rel=1e-5)
    assert measured.coverage == 1.0


def test_the_whole_selection_measures_like_no_selection_and_half_of_it_does_not(engine, text):
    free, whole, half = (evaluate(engine, text, chosen) for chosen in (None, Selection.whole(3, 8), HALF))
    assert whole == free
    assert half.nll != pytest.approx(free.nll, rel=1e-3)
    assert 0 < half.coverage < 1


def test_a_selection_that_does_not_fit_is_refused_with_the_numbers(model, text):
    with Engine.open(EngineConfig(model, memory=1 << 40, max_context=96, max_batch=2)) as roomy:
        floor = roomy.plan.floor_bytes
    with Engine.open(EngineConfig(model, memory=floor, max_context=96, max_batch=2)) as small:
        assert small.plan.slots < len(HALF)
        with pytest.raises(BudgetError, match="The selection has 12 experts"):
            evaluate(small, text, HALF)
        evaluate(small, text, None)  # the whole model still runs: it pages


def test_batches_hold_no_more_rows_and_tokens_than_allowed_and_lose_no_item(text):
    for rows, tokens in [(3, 10_000), (16, 80), (16, 1)]:
        parts = list(shards(text, rows, tokens))
        assert [one for part in parts for one in part] == text
        for part in parts:
            assert len(part) == 1 or (len(part) <= rows and len(part) * max(len(o.tokens) for o in part) <= tokens)


def test_padding_prompts_and_responses_are_told_apart(text):
    batch = pad(text[:3])
    for row, one in enumerate(text[:3]):
        length = len(one.tokens)
        assert batch.ids[row, :length].tolist() == list(one.tokens)
        assert batch.mask[row].tolist() == [1] * length + [0] * (batch.mask.shape[1] - length)
        assert batch.roles[row, :length].tolist() == [0] * len(one.prompt) + [1] * len(one.response)
        assert int(batch.halves[row]) == one.number % 2


def test_an_item_that_is_too_long_is_named_by_its_line(engine, monkeypatch):
    with pytest.raises(InvalidInput, match=r"here, line 4: \d+ tokens, the limit is 96"):
        encode_corpus(engine, gather([Item("short", line=3), Item("word " * 30, line=4)], source="here"))
    monkeypatch.setattr(engine, "card", replace(engine.card, max_context=96))
    with pytest.raises(InvalidInput, match=r"the limit is 96, all that the model knows\. Shorten the item\.$"):
        encode_corpus(engine, gather([Item("word " * 30, line=4)], source="here"))


def test_a_model_without_a_chat_template_gets_the_plain_text(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "has_chat_template", False)
    [one] = encode_corpus(engine, gather([Item("plain", "text")]))
    assert engine.tokenizer.decode(one.prompt) == "plain"
    assert engine.tokenizer.decode(one.response) == "text"
