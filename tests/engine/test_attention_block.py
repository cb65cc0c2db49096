"""A layer's whole attention in one call: against the module's own forward, bit for bit in any batch, in models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.attention import adopt_attention
from engine.attention_block import adopt_blocks, agrees, positions_of, usual_block
from engine.block_shape import BlockShape
from engine.engine import Engine
from engine.kvcache import KvCache, PooledLayer
from engine.layer_block import LayerBlock
from engine.products import Products, instruction_sets
from engine.requests import GenerationRequest, Sampling

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the products were not built: there was no C compiler")

USUAL = {  # what is particular to it
    "qwen2_moe": "biases",
    "qwen3_moe": "a norm for each head",
    "olmoe": "norms of all heads together",
    "glm4_moe": "half of a head turns",
    "mixtral": "heads that share keys",
    "minimax_m2": "norms of all heads, half of a head turns",
    "hunyuan_v1_moe": "norms after turning",
    "ernie4_5_moe": "neighbours turn together, by cosines in full precision",
    "cohere2_moe": "neighbours turn together, where any turn",
    "gpt_oss": "sinks, and cosines that are there once for two numbers",
}
OTHERS = {
    "deepseek_v3": "latent attention",
    "afmoe": "a gate",
}
COLUMNS = 9
Model = Callable[..., Any]


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Model:
    """A plain model whose attention is ours for single tokens, and random norms and biases."""

    def load(family: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
        made = AutoModelForCausalLM.from_pretrained(checkpoint(family, **fields)).eval().to(dtype)
        for name, parameter in made.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.data.normal_(1.0, 0.3)
        made.requires_grad_(False)
        adopt_attention(made, best())
        return made

    return load


def best() -> Products:
    return Products(next(iter(instruction_sets())))


def attentions(model: Any) -> Iterator[Any]:
    return (module for module in model.modules() if type(module).__name__.endswith("Attention"))


def parts(
    model: Any, rows: int, seed: int
) -> tuple[Any, BlockShape, Tensor, tuple[Tensor, Tensor], Tensor, list[Tensor]]:
    """The last attention, its shape, x [B, 1, H], cosines and sines, a mask with padding, keys and values."""
    module = list(attentions(model))[-1]
    made = torch.Generator().manual_seed(seed)
    rotary = next(one for one in model.modules() if type(one).__name__.endswith("RotaryEmbedding"))
    places = torch.randint(1, 500, (rows, 1), generator=made)
    positions = rotary(torch.zeros(1, dtype=model.dtype), places)
    tried = positions_of(model)
    assert tried is not None
    shape = usual_block(module, best(), tried)
    assert shape is not None
    x = torch.randn(rows, 1, shape.hidden, generator=made).to(model.dtype)
    mask = torch.ones(rows, 1, 1, COLUMNS + 1, dtype=torch.bool)
    for row in range(rows):
        mask[row, ..., : row % COLUMNS] = False
    kept = [
        torch.randn(rows, shape.kv_heads, COLUMNS + 4, shape.head, generator=made).to(model.dtype) for _ in range(2)
    ]
    return module, shape, x, positions, mask, kept


def cache_of(module: Any, kept: list[Tensor]) -> KvCache:
    layer = PooledLayer(kept[0].clone(), kept[1].clone(), 0, len(kept[0]))
    layer.length = COLUMNS
    return KvCache([layer] * (module.layer_idx + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", USUAL)
def test_a_token_comes_out_as_from_the_modules_own_forward(family: str, dtype: torch.dtype, model: Model) -> None:
    module, shape, x, positions, mask, kept = parts(model(family, dtype), 3, 11)
    near = 2e-5 if dtype == torch.float32 else 0.05
    for name in instruction_sets():
        for seen in (mask, mask[:1].expand(3, -1, -1, -1), None):
            theirs, mine = cache_of(module, kept), cache_of(module, kept)
            wanted = module(x, position_embeddings=positions, attention_mask=seen, past_key_values=theirs)[0]
            found = Products(name).block(shape, x, positions, seen, mine.extend(module.layer_idx, 1))
            torch.testing.assert_close(found, wanted, rtol=0, atol=near)
            assert mine.length == theirs.length == COLUMNS + 1
            for one, other in zip(mine.layers[-1].extend(0), theirs.layers[-1].extend(0), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_are_its_own_whatever_stands_beside_it_and_however_many_threads_work(
    dtype: torch.dtype, model: Model
) -> None:
    module, shape, x, positions, mask, kept = parts(model("qwen3_moe", dtype), 4, 12)
    before = torch.get_num_threads()
    together = best().block(shape, x, positions, mask, cache_of(module, kept).extend(module.layer_idx, 1))
    for row in range(4):
        own = slice(row, row + 1)
        cache = cache_of(module, [one[own] for one in kept])
        alone = best().block(
            shape, x[own], (positions[0][own], positions[1][own]), mask[own], cache.extend(module.layer_idx, 1)
        )
        assert torch.equal(alone, together[own])
    try:
        torch.set_num_threads(2)
        again = cache_of(module, kept).extend(module.layer_idx, 1)
        assert torch.equal(best().block(shape, x, positions, mask, again), together)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("family", USUAL)
def test_the_usual_is_taken_over_whole(family: str, model: Model) -> None:
    whole = model(family)
    assert adopt_blocks(whole, best(), lambda *_: 4) == len(list(attentions(whole)))


@pytest.mark.parametrize("family", OTHERS)
def test_modules_that_do_something_else_keep_their_own(family: str, model: Model) -> None:
    assert adopt_blocks(model(family), best(), lambda *_: 4) == 0


def test_a_module_that_clips_keeps_its_own_even_where_usual_inputs_are_not_clipped(model: Model) -> None:
    whole = model("olmoe")
    positions = positions_of(whole)
    assert positions is not None
    for module in attentions(whole):
        shape = usual_block(module, best(), positions)
        assert shape is not None
        assert agrees(module, shape, best(), positions)
    whole.config.clip_qkv = 30.0
    assert adopt_blocks(whole, best(), lambda *_: 4) == 0


def test_a_module_that_scales_otherwise_than_it_says_keeps_its_own(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model("mixtral")
    for module in attentions(whole):
        own = module.forward
        monkeypatch.setattr(module, "forward", lambda x, own=own, **named: (own(x, **named)[0] * 1.2, None))
    assert adopt_blocks(whole, best(), lambda *_: 4) == 0


def test_a_module_that_asks_for_positions_keeps_its_own(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may scale far ones, which a trial of two near ones would not show."""
    whole = model("mixtral")
    kind = type(next(attentions(whole)))
    theirs = kind.forward

    def forward(
        self: Any,
        hidden_states: Any,
        position_embeddings: Any,
        attention_mask: Any,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        kwargs.pop("position_ids", None)
        return theirs(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    assert adopt_blocks(whole, best(), lambda *_: 4) == 0


def test_models_decode_by_it_and_prefill_and_large_batches_by_their_own(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = Products.block

    def counted(self: Products, shape: BlockShape, x: Tensor, *rest: Any) -> Tensor:
        seen.append(len(x))
        return real(self, shape, x, *rest)

    monkeypatch.setattr(Products, "block", counted)
    monkeypatch.setattr(LayerBlock, "forward", lambda self, x, **named: self._theirs(x, **named))
    monkeypatch.setattr("engine.engine.Step.of", lambda *_: None)
    monkeypatch.setattr("engine.kernels.FEW", {torch.float32: 2})
    monkeypatch.setattr("engine.kernels.FEW_WEIGHTS", 0)
    engine = open_engine(checkpoint("qwen3_moe"), max_batch=3)
    layers = engine.passes._model.config.num_hidden_layers
    assert seen == [2] * 2 * layers  # the trials, of attention and of whole layers
    seen.clear()

    def ask(first: int) -> GenerationRequest:
        return GenerationRequest(
            tuple(range(first, first + 20)), None, "exact", Sampling(max_tokens=5, ignore_eos=True)
        )

    alone = [[event.text for event in engine.generate([ask(first)])][-1] for first in (10, 40, 70)]
    assert seen == [1] * (3 * 4 * layers)  # the first token comes from the prompt's pass
    seen.clear()
    list(engine.generate([ask(10), ask(40), ask(70)]))
    assert set(seen) <= {1, 2}
    seen.clear()
    plain = open_engine(checkpoint("qwen3_moe"), max_batch=3, kernel="torch")
    assert [[event.text for event in plain.generate([ask(first)])][-1] for first in (10, 40, 70)] == alone
    assert not seen


def test_columns_that_were_claimed_are_forgotten_where_the_pass_fails() -> None:
    cache = KvCache([PooledLayer(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 0, 1)])
    keys, _ = cache.extend(0, 1)
    keys[:, :, -1] = 1.0
    assert cache.length == 1
    cache.rewind(0)
    assert cache.length == 0
