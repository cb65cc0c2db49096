"""What passes touch: counted by hand, and against a plain forward of the same rows."""

from __future__ import annotations

import pytest
import torch

from benchmarks.mixed_steps import Clock, StepWeights, Touched, around_steps
from benchmarks.plain_memory import active_bytes, dense_bytes
from engine.config import EngineConfig
from engine.engine import Engine
from engine.passes import Passes
from engine.requests import GenerationRequest, Sampling
from engine.tiny import write_tiny
from store.checkpoint import CheckpointMap
from store.records import Selection


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with Engine.open(EngineConfig(write_tiny("olmoe", tmp_path_factory.mktemp("tiny")))) as engine:
        yield engine


def _requests(engine, prompts, tokens):
    whole = Selection.whole(engine.card.layers, engine.card.experts)
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    return [GenerationRequest(prompt, whole, "mask", sampling) for prompt in prompts]


def _hit(engine, texts):
    """Distinct experts of all layers that the last tokens of `texts` go through, each text in a pass of its own."""
    chosen = set()
    for text in texts:
        seen = _Last()
        ids = torch.tensor([text])
        engine.forward(ids, torch.ones_like(ids), [None], seen)
        chosen |= seen.chosen
    return len(chosen)


class _Last(Touched):
    def __init__(self):
        super().__init__(0)
        self.chosen = set()

    def routed(self, layer, x, logits, weights, index, valid):
        self.chosen |= {(layer, expert) for expert in index[-1].tolist()}


def test_each_expert_of_a_step_counts_once_and_padding_and_absent_strips_not_at_all():
    touched, none = Touched(experts=8), torch.empty(0)
    index = torch.tensor([[1, 2], [2, 8], [5, 6]])
    touched.routed(0, none, none, none, index, torch.tensor([True, True, False]))
    touched.routed(1, none, none, none, index, torch.tensor([True, True, True]))
    assert touched.hits == 2 + 4


def test_what_is_counted_of_a_batch_is_what_a_plain_forward_chooses_for_its_rows(engine):
    touched, prompts = Touched(engine.card.experts), [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    with around_steps(engine, touched.around):
        events = list(engine.generate(_requests(engine, prompts, tokens=2)))
    first = {event.row: event.token for event in reversed(events) if hasattr(event, "token")}
    assert (touched.steps, touched.tokens) == (1, 3)
    assert touched.hits == _hit(engine, [(*prompt, first[row]) for row, prompt in enumerate(prompts)])


def test_a_clock_tells_decoding_from_prompts_and_leaves_the_fast_way_open(engine):
    clock, single = Clock(), []

    def around(ids, routing):
        single.append(routing.observer is None)
        return clock.around(ids, routing)

    with around_steps(engine, around):
        list(engine.generate(_requests(engine, [(1, 2, 3)], tokens=1)))
        assert clock.prompt_s > 0 == clock.decode_s
        list(engine.generate(_requests(engine, [(1, 2, 3)], tokens=3)))
    assert clock.decode_s > 0
    assert all(single)


def test_nothing_is_watched_behind_the_block(engine):
    with pytest.raises(RuntimeError, match="stop"), around_steps(engine, Clock().around):
        raise RuntimeError("stop")
    assert engine.passes.step.__func__ is Passes.step


def test_weights_are_those_of_the_serving_dtype(tmp_path):
    model = write_tiny("olmoe", tmp_path, dtype="bfloat16")
    sizes = []
    for dtype in ("bfloat16", "float32"):
        with Engine.open(EngineConfig(model, dtype=dtype)) as engine:
            sizes.append(StepWeights.of(engine))
    stored, wide = sizes
    assert (wide.expert, wide.dense) == (2 * stored.expert, 2 * stored.dense)
    card = engine.card
    assert stored.dense == dense_bytes(CheckpointMap.open(model))
    assert stored.dense + card.layers * card.top_k * stored.expert == active_bytes(model)
