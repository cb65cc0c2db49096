"""Long exact prompts under a budget: each layer pages an expert once, and others get tokens between two layers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.bank import Bank
from engine.engine import Engine
from engine.generate import Batch
from engine.requests import FailedEvent, FinishedEvent, GenerationRequest, TokenEvent
from store.errors import CheckpointError
from store.records import Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
Ask = Callable[..., GenerationRequest]

LAYERS = 3  # of the tiny checkpoint
LIMITS: dict[str, Any] = {"max_batch": 4, "max_context": 96, "chunk_tokens": 16}
SELECTION = Selection.of([[0, 1]] * LAYERS)


def _prompt(seed: int, tokens: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(5, 200) for _ in range(tokens))


@pytest.fixture(params=["qwen3_moe", "qwen3_next"])
def folder(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Path:
    """Of a model that caches keys and values, or running states, too."""
    return checkpoint(request.param)


@pytest.fixture
def squeezed(folder: Path, open_engine: Open) -> Callable[..., Engine]:
    """An engine with `slots` slots for its 24 experts; None: with as few as serve at all."""

    def make(slots: int | None = None, **fields: Any) -> Engine:
        plan = open_engine(folder, **LIMITS).plan
        memory = plan.floor_bytes if slots is None else plan.fixed_bytes + slots * plan.slot_bytes
        engine = open_engine(folder, memory=memory, **{**LIMITS, **fields})
        engine.tokenizer.eos = frozenset()
        return engine

    return make


@pytest.fixture
def whole(folder: Path, open_engine: Open) -> Engine:
    engine = open_engine(folder, **{**LIMITS, "chunk_tokens": 96 * 4})
    engine.tokenizer.eos = frozenset()
    return engine


def _tokens(engine: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in requests]
    for event in engine.generate(requests):
        if isinstance(event, TokenEvent):
            found[event.row].append(event.token)
    return found


@pytest.mark.parametrize("slots", [None, 9, 16])
@pytest.mark.parametrize("lengths", [(70,), (70, 50, 64), (17, 17)])
def test_answers_are_those_of_the_whole_model(
    squeezed: Callable[..., Engine], whole: Engine, ask: Ask, slots: int | None, lengths: tuple[int, ...]
) -> None:
    requests = [ask(_prompt(seed, tokens), max_tokens=8) for seed, tokens in enumerate(lengths)]
    assert _tokens(squeezed(slots), requests) == _tokens(whole, requests)


def test_answers_are_those_of_the_plain_model(
    squeezed: Callable[..., Engine], folder: Path, plain_model: Callable[[Path], Any], ask: Ask
) -> None:
    prompt = _prompt(3, 60)
    [found] = _tokens(squeezed(), [ask(prompt, max_tokens=6)])
    with torch.inference_mode():
        plain = plain_model(folder).generate(
            torch.tensor([prompt]), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
    assert found == plain[0, len(prompt) :].tolist()


@pytest.mark.parametrize("lengths", [(80,), (40, 30, 45)])
def test_each_needed_expert_is_paged_in_once(
    squeezed: Callable[..., Engine], whole: Engine, ask: Ask, lengths: tuple[int, ...]
) -> None:
    """With slots for little more than one layer."""
    requests = [ask(_prompt(seed, tokens), max_tokens=1) for seed, tokens in enumerate(lengths)]
    needed: set[tuple[int, int]] = set()
    visit = Bank.visit
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Bank, "at_hand", lambda *_: None)
        patched.setattr(
            Bank, "visit", lambda bank, layer, ids: (needed.update((layer, e) for e in ids), visit(bank, layer, ids))[1]
        )
        _tokens(whole, requests)
    engine = squeezed(9)
    _tokens(engine, requests)
    assert engine.bank.paged.experts == len(needed) > 9


def test_prompts_are_scored_as_by_the_whole_model(squeezed: Callable[..., Engine], whole: Engine, ask: Ask) -> None:
    request = ask(_prompt(1, 70), max_tokens=2, logprobs=2, prompt_logprobs=True)
    [found, wanted] = (
        next(event for event in engine.generate([request]) if isinstance(event, FinishedEvent)).prompt_scores
        for engine in (squeezed(), whole)
    )
    assert len(found) == 70
    assert [s.logprob for s in found[1:]] == pytest.approx([s.logprob for s in wanted[1:]], abs=2e-4)


def test_running_rows_get_a_token_between_two_layers(squeezed: Callable[..., Engine], ask: Ask) -> None:
    engine = squeezed(16)
    with Batch(engine) as batch:
        batch.admit(0, ask(_prompt(0, 5), SELECTION, max_tokens=40))
        while not any(isinstance(event, TokenEvent) for event in batch.step()):
            pass
        batch.admit(1, ask(_prompt(1, 80), max_tokens=2))
        before: list[int] = []
        while 1 not in before:
            before += [event.row for event in batch.step() if isinstance(event, TokenEvent)]
    assert before.count(0) >= LAYERS


def test_a_prompt_that_is_cancelled_between_two_layers_leaves_the_others_as_they_were(
    squeezed: Callable[..., Engine], whole: Engine, ask: Ask
) -> None:
    requests = [ask(_prompt(seed, 60 + seed), max_tokens=4) for seed in range(3)]
    wanted = _tokens(whole, requests[1:])
    engine, found = squeezed(), dict[int, list[int]]({1: [], 2: []})
    with Batch(engine) as batch:
        for number, request in enumerate(requests):
            batch.admit(number, request)
        assert list(batch.step()) == []  # the first layer
        requests[0].cancelled.set()
        while len(batch):
            for event in batch.step():
                if isinstance(event, TokenEvent):
                    found[event.row].append(event.token)
    assert [found[1], found[2]] == wanted


@pytest.mark.parametrize("passes", [2, 12, 22])  # of nine a layer
def test_a_read_that_fails_on_the_way_leaves_no_column_and_no_lease(
    squeezed: Callable[..., Engine], whole: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    engine, request = squeezed(9), ask(_prompt(0, 70), max_tokens=4)
    visit, seen = Bank.visit, list[int]()

    def failing(bank: Bank, layer: int, experts: Any) -> Any:
        seen.append(layer)
        if len(seen) == passes:
            raise CheckpointError("torn")
        return visit(bank, layer, experts)

    with Batch(engine) as batch:
        batch.admit(0, request)
        monkeypatch.setattr(Bank, "at_hand", lambda *_: None)
        monkeypatch.setattr(Bank, "visit", failing)
        events = []
        while len(batch):
            group = batch._joining
            events += list(batch.step())
        assert [type(event) for event in events] == [FailedEvent]
        assert group is None or group.cache.length == 0
    monkeypatch.undo()
    assert engine.bank.residency.leased == 0
    assert _tokens(engine, [request]) == _tokens(whole, [request])


def test_a_prompt_as_long_as_the_context_pages_each_needed_expert_once_however_small_the_chunks(
    squeezed: Callable[..., Engine], whole: Engine, ask: Ask
) -> None:
    engine = squeezed(9, chunk_tokens=2)
    requests = [ask(_prompt(0, 95), max_tokens=1)]
    assert _tokens(engine, requests) == _tokens(whole, requests)
    assert engine.bank.paged.experts == 24


def test_the_plan_holds_the_states_of_a_whole_context_and_counts_those_that_half_a_chunk_leaves_no_room_for(
    checkpoint: Checkpoint, open_engine: Open
) -> None:
    def workspace(context: int) -> int:
        engine = open_engine(checkpoint("qwen3_moe"), max_batch=1, max_context=context, chunk_tokens=2)
        assert engine.plan.carried_tokens == max(context, free)
        return engine.plan.workspace_bytes

    free, state = 25, 32 * 4  # tokens whose states half a chunk leaves room for; bytes of one
    below, above = workspace(20) - workspace(10), workspace(50) - workspace(40)
    assert above - below == 10 * state


def test_several_prompts_that_are_longer_than_the_plan_carries_go_through_in_several_sweeps(
    squeezed: Callable[..., Engine], whole: Engine, ask: Ask
) -> None:
    engine = squeezed(9, chunk_tokens=2)
    requests = [ask(_prompt(seed, 70), max_tokens=4) for seed in range(3)]
    assert sum(len(request.prompt) for request in requests) > engine.plan.carried_tokens
    assert _tokens(engine, requests) == _tokens(whole, requests)
