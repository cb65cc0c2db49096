"""PreMoe's query signature: the formula on the first router's own logits, and no expert is read for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.signature import signature
from engine.tiny import write_tiny
from store.errors import InvalidInput

PROMPT = list(b"which experts does this want?")


class Logits:
    """Keeps layer 0's logits of a whole pass."""

    def __init__(self) -> None:
        self.first = torch.zeros(0)

    def residual(self, layer, h):
        pass

    def routed(self, layer, x, logits, weights, index, valid):
        if layer == 0:
            self.first = logits.double()

    def experts(self, layer, experts, tokens, weights, outputs):
        pass

    def combined(self, layer, y):
        pass


@pytest.fixture(scope="module", params=["olmoe", "deepseek_v3"])
def engine(request, tmp_path_factory):
    folder = write_tiny(request.param, tmp_path_factory.mktemp(request.param), seed=5)
    with Engine.open(EngineConfig(folder, max_context=64)) as opened:
        yield opened


def test_the_signature_is_the_masked_mean_of_the_first_routers_top_logits(engine):
    found = signature(engine, PROMPT)
    assert engine.residency().experts_paged == 0
    whole, ids = Logits(), torch.tensor([PROMPT])
    engine.forward(ids, torch.ones_like(ids), [None], whole)
    expected = np.zeros(engine.card.experts)
    for z in whole.first.numpy():
        expected[z.argmax()] += z.max() / len(PROMPT)
    assert (found.dtype, found.shape) == (np.float32, (engine.card.experts,))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_engine_is_as_before_after_the_pass_was_cut_short(engine):
    ids = torch.tensor([PROMPT])
    before = engine.forward(ids, torch.ones_like(ids), [None])
    signature(engine, PROMPT[:5])
    assert torch.equal(engine.forward(ids, torch.ones_like(ids), [None]), before)
    np.testing.assert_array_equal(signature(engine, PROMPT), signature(engine, PROMPT))


def test_other_prompts_have_other_signatures(engine):
    assert not np.allclose(signature(engine, PROMPT), signature(engine, list(b"SELECT * FROM t")))


def test_a_prompt_without_tokens_is_refused(engine):
    with pytest.raises(InvalidInput, match="at least one token"):
        signature(engine, [])
