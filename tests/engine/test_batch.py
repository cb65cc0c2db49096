"""Continuous batching: whoever joins, leaves, is cancelled or fails, every other row's text is what it is alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.generate import Batch
from engine.requests import FailedEvent, FinishedEvent, GenerationRequest, TokenEvent
from store.errors import BudgetError, CheckpointError
from store.records import Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
Ask = Callable[..., GenerationRequest]


@dataclass
class Seen:
    tokens: list[int] = field(default_factory=list)
    done: FinishedEvent | None = None
    error: Exception | None = None


def _run(
    engine: Engine, arrivals: list[tuple[int, GenerationRequest]], cancels: dict[int, int] | None = None
) -> list[Seen]:
    """Request n arrives at its boundary, or at the first where it fits; it is cancelled after cancels[n] tokens."""
    seen = [Seen() for _ in arrivals]
    waiting, boundary = list(enumerate(arrivals)), 0
    with Batch(engine) as batch:
        while waiting or len(batch):
            for number, (when, request) in list(waiting):
                if when <= boundary and batch.fits(request.selection):
                    batch.admit(number, request)
                    waiting.remove((number, (when, request)))
            for event in batch.step():
                match event:
                    case TokenEvent():
                        seen[event.row].tokens.append(event.token)
                    case FinishedEvent():
                        seen[event.row].done = event
                    case FailedEvent():
                        seen[event.row].error = event.error
            for number, tokens in (cancels or {}).items():
                if len(seen[number].tokens) >= tokens and boundary >= arrivals[number][0]:
                    arrivals[number][1].cancelled.set()
            boundary += 1
    assert engine.residency().leased == 0
    return seen


def _draw(engine: Engine, rng: random.Random, ask: Ask, selections: list[Selection | None]) -> GenerationRequest:
    room = engine.plan.max_context
    length = rng.choice((rng.randint(1, 8), rng.randint(1, room - 1)))
    longest = room - length
    tokens = rng.choice((rng.randint(1, min(6, longest)), rng.randint(1, longest), longest))
    prompt = tuple(rng.randrange(256) for _ in range(length))
    sampling = rng.choice(({}, {"temperature": 1.0, "top_p": 0.9, "seed": rng.randrange(100)}))
    return ask(prompt, rng.choice(selections), max_tokens=tokens, **sampling)


# Keys and values; then running states, beside keys and values and beside latent ones; then indexers.
REMEMBERING = ("qwen3_next", "granitemoehybrid", "jamba", "nemotron_h", "lfm2_moe", "kimi_linear", "bailing_hybrid")
KINDS = ("qwen3_moe", "gpt_oss", "deepseek_v3", *REMEMBERING, "deepseek_v32", "glm_moe_dsa")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_random_arrivals_and_cancels_never_change_a_row(
    kind: str, seed: int, checkpoint: Checkpoint, open_engine: Open, ask: Ask,
    random_selection: Callable[[Engine, random.Random], Selection],
) -> None:  # fmt: skip
    rng = random.Random(seed)
    engine = open_engine(
        checkpoint(kind), max_batch=rng.randint(2, 5), max_context=40, chunk_tokens=rng.choice((8, 64))
    )
    engine.tokenizer.eos = frozenset()
    selections = [None, *(random_selection(engine, rng) for _ in range(3))]
    arrivals = [(rng.randrange(60), _draw(engine, rng, ask, selections)) for _ in range(16)]
    for number in range(0, 16, 3):  # answers to one prompt, which arrive with it
        when, request = arrivals[number + 1 if number < 15 else 0]
        sampling = replace(request.sampling, temperature=1.0, seed=number)
        arrivals[number] = (when, replace(request, sampling=sampling, cancelled=threading.Event()))
    cancels = {number: rng.randrange(6) for number in rng.sample(range(16), 4)}
    alone = [_run(engine, [(0, request)])[0] for _, request in arrivals]
    for number, (ours, theirs) in enumerate(zip(_run(engine, arrivals, cancels), alone, strict=True)):
        assert ours.done is not None
        assert theirs.done is not None
        if ours.done.reason == "cancelled":
            assert number in cancels
            assert ours.tokens == theirs.tokens[: len(ours.tokens)]
            continue
        assert (ours.tokens, ours.done.text) == (theirs.tokens, theirs.done.text)
        assert ours.done.served.coverage == pytest.approx(theirs.done.served.coverage, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["qwen2_moe", *REMEMBERING, "glm_moe_dsa"])
def test_random_arrivals_under_a_tight_budget_never_change_a_row(
    kind: str, seed: int, checkpoint: Checkpoint, open_engine: Open, ask: Ask
) -> None:
    """Slots for two selections of half the experts and one to page through: rows wait, experts are evicted."""
    rng, folder = random.Random(seed), checkpoint(kind)
    roomy = open_engine(folder, max_context=40, max_batch=4, chunk_tokens=16)
    layers = roomy.card.layers
    memory = roomy.plan.fixed_bytes + (6 * layers + 1) * roomy.plan.slot_bytes
    tight = open_engine(folder, max_context=40, max_batch=4, chunk_tokens=16, memory=memory)
    assert tight.plan.slots == 6 * layers + 1
    for engine in (roomy, tight):
        engine.tokenizer.eos = frozenset()
    selections = [None, *(Selection.of([sorted(rng.sample(range(8), 3))] * layers) for _ in range(4))]
    arrivals = [(rng.randrange(30), _draw(tight, rng, ask, selections)) for _ in range(12)]
    for (_, request), ours in zip(arrivals, _run(tight, arrivals), strict=True):
        assert ours.error is None, ours.error
        assert ours.tokens == _run(roomy, [(0, request)])[0].tokens


def test_an_exact_row_that_cannot_read_fails_alone_and_the_others_lose_no_token(
    checkpoint: Checkpoint, open_engine: Open, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(checkpoint("qwen3_moe"))
    engine.tokenizer.eos = frozenset()
    half = Selection.of([range(4)] * 3)
    mask, exact = ask((1, 2, 3), half, max_tokens=20), ask((4, 5), max_tokens=20)
    alone = _run(engine, [(0, mask)])[0]
    real, passes = engine.bank.visit, []

    def visit(layer: int, experts: Any) -> Any:
        passes.append(layer)
        if layer == 2 and len(passes) > 20 and any(expert >= 4 for expert in experts):  # in the middle of a pass
            raise CheckpointError("the disk is gone")
        return real(layer, experts)

    monkeypatch.setattr(engine.bank, "visit", visit)
    monkeypatch.setattr(engine.bank, "at_hand", lambda *_: None)
    ours, theirs = _run(engine, [(0, mask), (2, exact)])
    assert isinstance(theirs.error, CheckpointError)
    assert theirs.tokens
    assert ours.tokens == alone.tokens


def test_a_request_that_does_not_fit_is_refused_and_changes_nothing(
    checkpoint: Checkpoint, open_engine: Open, ask: Ask
) -> None:
    engine = open_engine(checkpoint("qwen3_moe"), max_batch=1)
    half = Selection.of([range(4)] * 3)
    with Batch(engine) as batch:
        batch.admit(0, ask((1,), half))
        assert batch.full
        assert not batch.fits(half)
        with pytest.raises(BudgetError, match="at most 1 rows"):
            batch.admit(1, ask((1,), half))
        assert len(batch) == 1
