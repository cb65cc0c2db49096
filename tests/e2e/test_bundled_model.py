"""The bundled model is what its card says: it equals plain transformers, and it knows its tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from demo.corpus import read_pairs
from demo.prepare import corpus
from demo.tasks.registry import TASKS
from engine.config import EngineConfig
from engine.engine import Engine
from profiler.batches import encode_corpus
from profiler.evaluate import evaluate
from store.records import Selection

NAMES = [task.name for task in TASKS]
SIZE_LIMIT = 40_000_000  # bytes of weights in the repository


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine.open(EngineConfig(model, max_batch=32, max_context=256)) as opened:
        yield opened


def test_the_weights_fit_into_the_repository(model: Path, engine: Engine) -> None:
    assert sum(path.stat().st_size for path in model.glob("*.safetensors")) < SIZE_LIMIT
    assert (engine.card.layers, engine.card.experts, engine.card.top_k) == (6, 64, 4)
    assert not list(model.glob("*.bin"))


def test_the_whole_selection_equals_plain_transformers(model: Path) -> None:
    """The whole rule, in f32, on real queries of every task in one padded batch."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with Engine.open(EngineConfig(model, max_batch=16, dtype="float32")) as engine, torch.no_grad():
        prompts = [
            engine.tokenizer.encode_chat([{"role": "user", "content": read_pairs(t, "test")[0].prompt}]) for t in NAMES
        ]
        width = max(map(len, prompts))
        ids = torch.tensor([list(p) + [0] * (width - len(p)) for p in prompts])
        mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts])
        whole = Selection.whole(engine.card.layers, engine.card.experts)
        got = engine.forward(ids, mask, [whole] * len(prompts))
        wanted = plain(input_ids=ids, attention_mask=mask).logits
    valid = mask.bool()
    torch.testing.assert_close(got[valid], wanted[valid], atol=1e-3, rtol=1e-3)


def test_the_whole_model_answers_nine_in_ten_held_out_queries(engine: Engine) -> None:
    measured = [
        evaluate(engine, encode_corpus(engine, corpus(name, "test", 20)), None).accuracy or 0.0 for name in NAMES
    ]
    assert sum(measured) / len(measured) >= 0.9, dict(zip(NAMES, measured, strict=True))
