"""Generation: greedy as transformers does it, sampling that no batch changes, ends of every kind, receipts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.requests import Event, FinishedEvent, GenerationRequest, Sampling, TokenEvent
from engine.sampling import Sampler
from store.errors import Busy, InvalidInput
from store.records import Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
Ask = Callable[..., GenerationRequest]
Finished = Callable[[Iterator[Event]], dict[int, FinishedEvent]]


def _prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(256) for _ in range(length))


def _tokens(events: list[Event], row: int = 0) -> list[int]:
    return [event.token for event in events if isinstance(event, TokenEvent) and event.row == row]


def _endless(engine: Engine) -> Engine:
    """No token ends an answer, so that lengths are known."""
    engine.tokenizer.eos = frozenset()
    return engine


def test_greedy_text_is_that_of_transformers(
    family: str, checkpoint: Checkpoint, open_engine: Open, plain_model: Callable[[Path], Any], ask: Ask
) -> None:
    folder = checkpoint(family)
    engine = _endless(open_engine(folder, chunk_tokens=7))
    prompt = _prompt(23)
    events = list(engine.generate([ask(prompt, max_tokens=30)]))
    plain = plain_model(folder)
    plain.generation_config.eos_token_id = None
    wanted = plain.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, 23:].tolist()
    assert _tokens(events) == wanted


def test_decoding_with_the_cache_equals_a_full_forward(
    family: str, checkpoint: Checkpoint, open_engine: Open, ask: Ask,
    random_selection: Callable[[Engine, random.Random], Selection],
) -> None:  # fmt: skip
    engine = _endless(open_engine(checkpoint(family), chunk_tokens=64))
    selection = random_selection(engine, random.Random(1))
    prompt = _prompt(20, 1)
    tokens = _tokens(list(engine.generate([ask(prompt, selection, max_tokens=12)])))
    ids = torch.tensor([[*prompt, *tokens]])
    logits = engine.forward(ids, torch.ones_like(ids), [selection])[0, 19:-1]
    assert logits.argmax(-1).tolist() == tokens


def test_rows_of_different_lengths_and_selections_generate_what_they_generate_alone(
    family: str, checkpoint: Checkpoint, open_engine: Open, ask: Ask,
    random_selection: Callable[[Engine, random.Random], Selection],
) -> None:  # fmt: skip
    engine = _endless(open_engine(checkpoint(family), chunk_tokens=40))
    rng = random.Random(2)
    selections = [random_selection(engine, rng), None, random_selection(engine, rng), None]
    requests = [
        ask(_prompt(length, length), selection, max_tokens=tokens)
        for length, selection, tokens in zip((5, 31, 17, 1), selections, (9, 4, 15, 7), strict=True)
    ]
    together = list(engine.generate(requests))
    for row, request in enumerate(requests):
        alone = list(engine.generate([request]))
        assert _tokens(together, row) == _tokens(alone)
        ours, theirs = (next(e for e in events if isinstance(e, FinishedEvent) and e.row == at)
                        for events, at in ((together, row), (alone, 0)))  # fmt: skip
        assert (ours.text, ours.reason, ours.completion_tokens) == (theirs.text, "length", request.sampling.max_tokens)
        assert ours.served.coverage == pytest.approx(theirs.served.coverage, abs=1e-5)


def test_a_seed_gives_the_same_text_in_any_batch_and_another_seed_another(
    checkpoint: Checkpoint, open_engine: Open, ask: Ask
) -> None:
    engine = _endless(open_engine(checkpoint("qwen2_moe")))

    def draw(seed: int, length: int = 9) -> GenerationRequest:
        return ask(_prompt(length, length), max_tokens=20, temperature=1.0, top_p=0.9, seed=seed)

    alone = _tokens(list(engine.generate([draw(7)])))
    together = list(engine.generate([draw(1, 14), draw(7), draw(7), draw(8)]))
    assert _tokens(together, 1) == _tokens(together, 2) == alone
    assert _tokens(together, 3) != alone


def test_sampling_follows_the_distribution_inside_top_p() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampler = Sampler(Sampling(temperature=0.7, top_p=0.9, seed=0))
    counts = torch.bincount(torch.tensor([sampler.draw(logits) for _ in range(4000)]), minlength=4) / 4000
    probabilities = (logits / 0.7).softmax(-1)
    kept = torch.tensor([True, True, False, False])  # 0.77 + 0.18 reach 0.9
    wanted = probabilities.where(kept, 0) / probabilities[kept].sum()
    torch.testing.assert_close(counts, wanted, atol=0.03, rtol=0)
    tiny = Sampler(Sampling(temperature=1.5, top_p=1e-9, seed=0))
    assert {tiny.draw(logits) for _ in range(20)} == {0}


def test_an_end_token_ends_the_row_and_is_no_text(checkpoint: Checkpoint, open_engine: Open, ask: Ask) -> None:
    engine = _endless(open_engine(checkpoint("mixtral")))
    prompt = _prompt(8, 3)
    tokens = _tokens(list(engine.generate([ask(prompt, max_tokens=20)])))
    engine.tokenizer.eos = frozenset([tokens[5]])
    first = tokens.index(tokens[5])
    events = list(engine.generate([ask(prompt, max_tokens=20)]))
    done = events[-1]
    assert isinstance(done, FinishedEvent)
    assert (done.reason, done.completion_tokens, _tokens(events)) == ("stop", first + 1, tokens[: first + 1])
    assert done.text == engine.tokenizer.decode(tokens[:first])


def test_an_end_token_may_be_ignored(checkpoint: Checkpoint, open_engine: Open, ask: Ask) -> None:
    engine = _endless(open_engine(checkpoint("mixtral")))
    prompt = _prompt(8, 3)
    tokens = _tokens(list(engine.generate([ask(prompt, max_tokens=20)])))
    engine.tokenizer.eos = frozenset([tokens[5]])
    *_, done = events = list(engine.generate([ask(prompt, max_tokens=20, ignore_eos=True)]))
    assert isinstance(done, FinishedEvent)
    assert (done.reason, _tokens(events)) == ("length", tokens)


def test_the_texts_of_the_tokens_join_to_the_final_text(checkpoint: Checkpoint, open_engine: Open, ask: Ask) -> None:
    engine = _endless(open_engine(checkpoint("olmoe")))
    events = list(engine.generate([ask(_prompt(4, n), max_tokens=25, temperature=1.2, seed=n) for n in range(4)]))
    for row in range(4):
        texts = [event.text for event in events if isinstance(event, TokenEvent) and event.row == row]
        [done] = [event for event in events if isinstance(event, FinishedEvent) and event.row == row]
        assert "".join(texts) == done.text == engine.tokenizer.decode(_tokens(events, row))
        assert len(texts) == done.completion_tokens == 25


def test_a_stop_string_across_tokens_never_leaks(checkpoint: Checkpoint, open_engine: Open, ask: Ask) -> None:
    """Every token is a byte, so any stop string of two characters lies across tokens."""
    engine = _endless(open_engine(checkpoint("olmoe")))
    request = {"max_tokens": 40, "temperature": 1.0, "seed": 5}
    [*_, whole] = engine.generate([ask(_prompt(4), **request)])
    assert isinstance(whole, FinishedEvent)
    stop = whole.text[6:8]
    events = list(engine.generate([ask(_prompt(4), stop=(stop, "never there"), **request)]))
    done = events[-1]
    assert isinstance(done, FinishedEvent)
    assert done.reason == "stop"
    assert done.text == whole.text[: whole.text.index(stop)]
    assert "".join(event.text for event in events if isinstance(event, TokenEvent)) == done.text
    assert done.completion_tokens < 40


def test_a_cancelled_row_ends_and_the_others_go_on(checkpoint: Checkpoint, open_engine: Open, ask: Ask) -> None:
    engine = _endless(open_engine(checkpoint("qwen3_moe")))
    requests = [ask(_prompt(5, n), max_tokens=12) for n in range(3)]
    alone = _tokens(list(engine.generate([requests[2]])))
    events = []
    for event in engine.generate(requests):
        events.append(event)
        if isinstance(event, TokenEvent) and event.row == 1 and len(_tokens(events, 1)) == 3:
            requests[1].cancelled.set()
    done = {event.row: event for event in events if isinstance(event, FinishedEvent)}
    assert [done[row].reason for row in range(3)] == ["length", "cancelled", "length"]
    assert done[1].completion_tokens == 3
    assert _tokens(events, 2) == alone


def test_a_request_cancelled_before_it_began_costs_nothing(checkpoint: Checkpoint, open_engine: Open, ask: Ask) -> None:
    engine = open_engine(checkpoint("qwen3_moe"))
    request = ask(_prompt(5), Selection.whole(3, 8))
    request.cancelled.set()
    [done] = engine.generate([request])
    assert isinstance(done, FinishedEvent)
    assert (done.reason, done.completion_tokens) == ("cancelled", 0)
    assert engine.residency().resident == 0


def test_a_request_cancelled_during_its_prompt_ends_after_the_chunk(
    checkpoint: Checkpoint, open_engine: Open, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(checkpoint("qwen3_moe"), chunk_tokens=8)
    request, real, chunks = ask(_prompt(60), Selection.of([range(4)] * 3)), engine.passes.step, []

    def step(*args: Any) -> torch.Tensor:
        chunks.append(args)
        request.cancelled.set()
        return real(*args)

    monkeypatch.setattr(engine.passes, "step", step)
    [done] = engine.generate([request])
    assert isinstance(done, FinishedEvent)
    assert (done.reason, done.completion_tokens, len(chunks)) == ("cancelled", 0, 1)


def test_an_abandoned_generation_gives_lease_and_cache_back(
    checkpoint: Checkpoint, open_engine: Open, ask: Ask
) -> None:
    engine = _endless(open_engine(checkpoint("qwen3_moe")))
    half = Selection.of([range(4)] * 3)
    events = engine.generate([ask(_prompt(5), half, max_tokens=50)])
    next(events)
    assert engine.residency().leased == len(half)
    with pytest.raises(Busy, match="Another batch"):
        next(engine.generate([ask(_prompt(5))]))
    events.close()
    assert engine.residency().leased == 0
    assert len(list(engine.generate([ask(_prompt(5), max_tokens=3)]))) == 4


def test_what_does_not_fit_into_one_batch_runs_in_the_next(
    checkpoint: Checkpoint, open_engine: Open, ask: Ask, finished: Finished
) -> None:
    engine = _endless(open_engine(checkpoint("qwen2_moe"), max_batch=2, max_context=40))
    shapes = [(30, 5), (5, 30), (6, 6), (7, 7), (34, 6)]  # 30 + 30 columns are too wide for the context
    requests = [ask(_prompt(length, length), max_tokens=tokens) for length, tokens in shapes]
    done = finished(engine.generate(requests))
    assert [done[row].completion_tokens for row in range(5)] == [5, 30, 6, 7, 6]
    for row, request in enumerate(requests):
        assert done[row].text == finished(engine.generate([request]))[0].text


def test_a_receipt_says_what_was_read_for_the_request(
    checkpoint: Checkpoint, open_engine: Open, ask: Ask, finished: Finished
) -> None:
    engine = _endless(open_engine(checkpoint("qwen2_moe")))
    size, half = engine.card.expert_bytes, Selection.of([range(4)] * 3)
    done = finished(engine.generate([ask(_prompt(5), half, max_tokens=4), ask(_prompt(6), half, max_tokens=4)]))
    assert (done[0].served.experts, done[0].served.experts_paged, done[0].served.bytes_paged) == (12, 12, 12 * size)
    assert (done[1].served.experts, done[1].served.experts_paged) == (12, 0)
    assert 0 < done[0].served.coverage < 1
    assert done[0].served.resident_bytes == 12 * engine.plan.slot_bytes
    assert done[0].served.swap_ms > 0
    assert 0 < done[0].served.ttft_ms < 60_000
    exact = finished(engine.generate([ask(_prompt(5), max_tokens=4), ask(_prompt(9), max_tokens=4)]))
    paged = sum(exact[row].served.experts_paged for row in range(2))
    assert paged == engine.residency().experts_paged - 12
    assert sum(exact[row].served.bytes_paged for row in range(2)) == paged * size
    assert exact[0].served.mode == "exact"
    assert exact[0].served.coverage == 1


def test_exact_generation_at_the_floor_equals_exact_generation_without_a_budget(
    family: str, checkpoint: Checkpoint, open_engine: Open, ask: Ask
) -> None:
    folder = checkpoint(family)
    roomy = _endless(open_engine(folder))
    from engine.config import EngineConfig
    from engine.plan import plan_memory

    floor = plan_memory(roomy.card, EngineConfig(folder, memory=2**40, chunk_tokens=32)).floor_bytes
    tight = _endless(open_engine(folder, memory=floor, chunk_tokens=32))
    requests = [ask(_prompt(11), max_tokens=10), ask(_prompt(3, 1), max_tokens=6)]
    for row in range(2):
        assert _tokens(list(tight.generate(requests)), row) == _tokens(list(roomy.generate(requests)), row)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": ("",)}, "stop"),
        ({"stop": tuple("abcdefghijklmnopq")}, "stop"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_bad_sampling_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        Sampling(**fields)
    assert refusal.value.param == param


def test_bad_requests_are_refused_before_anything_runs(checkpoint: Checkpoint, open_engine: Open, ask: Ask) -> None:
    engine = open_engine(checkpoint("qwen2_moe"))
    good = ask(_prompt(3), max_tokens=2)
    for bad, message in ((ask(()), "prompt is empty"), (ask((5, 999)), "outside the vocabulary of 260")):
        with pytest.raises(InvalidInput, match=message) as refusal:
            engine.generate([good, bad])
        assert refusal.value.param == "prompt"
    with pytest.raises(InvalidInput, match="no selection"):
        GenerationRequest((1,), None, "mask")
    with pytest.raises(InvalidInput, match="a selection"):
        GenerationRequest((1,), Selection.whole(3, 8), "exact")
