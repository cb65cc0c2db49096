"""Log-probabilities of prompts and answers against a full forward."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.requests import FinishedEvent, GenerationRequest, Sampling, TokenEvent
from store.records import Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
Draw = Callable[[Engine, random.Random], Selection]


def _prompt(length: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(256) for _ in range(length))


def test_every_token_is_scored_as_a_full_forward_does(
    family: str, checkpoint: Checkpoint, open_engine: Open, random_selection: Draw
) -> None:
    """Prompts of different lengths, in chunks, in one batch, each inside its own selection."""
    engine = open_engine(checkpoint(family), chunk_tokens=16)
    engine.tokenizer.eos = frozenset()
    rng = random.Random(3)
    asked = [
        GenerationRequest(
            _prompt(length, length),
            random_selection(engine, rng),
            "mask",
            Sampling(max_tokens=3, logprobs=2, prompt_logprobs=True, temperature=1.0, seed=length),
        )
        for length in (21, 12, 17, 1)
    ]
    finished: dict[int, FinishedEvent] = {}
    tokens: dict[int, list[int]] = {row: [] for row in range(4)}
    for event in engine.generate(asked):
        if isinstance(event, TokenEvent):
            tokens[event.row].append(event.token)
        else:
            finished[event.row] = event
    for row, request in enumerate(asked):
        scores = (*finished[row].prompt_scores, *finished[row].scores)
        whole = (*request.prompt, *tokens[row])
        assert [score.token for score in scores] == list(whole)
        assert scores[0].logprob is None
        ids = torch.tensor([whole])[:, :16]  # one pass holds 16 tokens
        logprobs = engine.forward(ids, torch.ones_like(ids), [request.selection])[0].log_softmax(-1)
        for column in range(1, min(16, len(whole))):
            wanted = logprobs[column - 1]
            assert scores[column].logprob == pytest.approx(float(wanted[whole[column]]), abs=2e-4)
            best = wanted.topk(2).values.tolist()
            assert [value for _, value in scores[column].top] == pytest.approx(best, abs=2e-4)


def test_a_prompt_can_be_scored_without_an_answer(checkpoint: Checkpoint, open_engine: Open) -> None:
    engine = open_engine(checkpoint("qwen3_moe"))
    sampling = Sampling(max_tokens=0, logprobs=1, prompt_logprobs=True)
    [finished] = engine.generate([GenerationRequest(_prompt(9, 1), None, "exact", sampling)])
    assert isinstance(finished, FinishedEvent)
    assert (finished.reason, finished.text, finished.completion_tokens) == ("length", "", 0)
    assert len(finished.prompt_scores) == 9
    assert finished.scores == ()


def test_the_first_token_of_a_stream_brings_the_prompts_scores(checkpoint: Checkpoint, open_engine: Open) -> None:
    engine = open_engine(checkpoint("qwen3_moe"))
    sampling = Sampling(max_tokens=2, logprobs=0, prompt_logprobs=True, ignore_eos=True)
    first, second, finished = engine.generate([GenerationRequest(_prompt(9, 1), None, "exact", sampling)])
    assert isinstance(first, TokenEvent)
    assert isinstance(second, TokenEvent)
    assert isinstance(finished, FinishedEvent)
    assert first.prompt_scores == finished.prompt_scores
    assert second.prompt_scores == ()
    assert finished.scores == (first.score, second.score)
