"""Steps of single tokens without the model's own forward: the same answers, and only where nothing is left out."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.engine import Engine
from engine.products import instruction_sets
from engine.requests import FinishedEvent, GenerationRequest, Sampling, TokenEvent
from engine.step import Step
from store.records import Selection

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the products were not built: there was no C compiler")

Pick = Callable[[Engine, random.Random], Selection]


def ask(first: int, selection: Selection | None, tokens: int = 8) -> GenerationRequest:
    mode = "exact" if selection is None else "mask"
    sampling = Sampling(max_tokens=tokens, ignore_eos=True, logprobs=1)
    return GenerationRequest(tuple(range(first, first + 9 + first % 5)), selection, mode, sampling)  # type: ignore[arg-type]


def answers(engine: Engine, requests: list[GenerationRequest]) -> list[Any]:
    """Tokens, their logprobs and coverage, row by row."""
    found: list[Any] = [[] for _ in requests]
    for event in engine.generate(requests):
        if isinstance(event, TokenEvent):
            assert event.score is not None
            found[event.row].append((event.token, event.score.logprob))
        elif isinstance(event, FinishedEvent):
            found[event.row].append(event.served.coverage)
    return found


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each step that went this way."""
    seen: list[int] = []
    real = Step.__call__

    def counted(self: Step, ids: Tensor, *rest: Any) -> Tensor:
        seen.append(len(ids))
        return real(self, ids, *rest)

    monkeypatch.setattr(Step, "__call__", counted)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral"])
def test_a_step_gives_to_the_bit_what_the_models_forward_gives(
    family: str,
    dtype: str,
    checkpoint: Callable[..., Path],
    open_engine: Callable[..., Engine],
    random_selection: Pick,
    steps: list[int],
) -> None:
    """Rows of several tasks and a free one, which join and leave at different times, so that some are padded."""
    engine, rng = open_engine(checkpoint(family, dtype=dtype), max_batch=4), random.Random(1)
    picked = [random_selection(engine, rng), None, random_selection(engine, rng), random_selection(engine, rng)]
    requests = [ask(10 * place + 3, selection, 4 + 3 * place) for place, selection in enumerate(picked)]
    assert engine.passes._step is not None
    assert "two calls, nothing around them" in engine.kernel
    ours = answers(engine, requests)
    assert 4 in steps
    assert 1 in steps
    steps.clear()
    engine.passes._step = None
    assert answers(engine, requests) == ours
    assert not steps


def _changed(monkeypatch: pytest.MonkeyPatch, kind: str, change: Callable[[Callable[..., Any]], Any]) -> None:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling

    owner = getattr(modeling, kind)
    monkeypatch.setattr(owner, "forward", change(owner.forward))


def _scales_logits(real: Callable[..., Any]) -> Any:
    def forward(self: Any, *args: Any, **named: Any) -> Any:
        out = real(self, *args, **named)
        out.logits = out.logits * 0.5
        return out

    return forward


def _scales_embeddings(real: Callable[..., Any]) -> Any:
    def forward(self: Any, input_ids: Any = None, inputs_embeds: Any = None, **named: Any) -> Any:
        return real(self, inputs_embeds=self.embed_tokens(input_ids) * 2, **named)

    return forward


def _moves_positions(real: Callable[..., Any]) -> Any:
    def forward(self: Any, *args: Any, position_ids: Any = None, **named: Any) -> Any:
        return real(self, *args, position_ids=None if position_ids is None else position_ids + 1, **named)

    return forward


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Qwen3MoeForCausalLM", _scales_logits),
        ("Qwen3MoeModel", _scales_embeddings),
        ("Qwen3MoeModel", _moves_positions),
    ],
)
def test_a_model_that_does_more_around_its_layers_keeps_its_forward(
    kind: str,
    change: Callable[[Callable[..., Any]], Any],
    checkpoint: Callable[..., Path],
    open_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _changed(monkeypatch, kind, change)
    engine = open_engine(checkpoint("qwen3_moe"))
    assert engine.kernel.endswith("decoder layers in two calls")
    assert engine.passes._step is None


def test_a_window_that_is_shorter_than_the_context_shows(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    folder = checkpoint("mixtral", sliding_window=40)
    assert open_engine(folder, max_context=32).passes._step is not None
    assert open_engine(folder, max_context=64).passes._step is None


def test_whoever_listens_to_the_decoder_hears_every_step(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], steps: list[int]
) -> None:
    engine = open_engine(checkpoint("qwen3_moe"))
    with engine.head.listening() as heard:
        answers(engine, [ask(10, None, 5)])
    assert not steps
    assert [states.shape[1] for states in heard[1:]] == [1] * 4
    assert torch.isfinite(heard[-1]).all()
