"""Our own attention of single tokens: against float64, bit for bit in any batch, and in models in place of torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import EAGER, IMPLEMENTATION, OWN, attend
from engine.engine import Engine
from engine.products import Products, attends, instruction_sets
from engine.requests import GenerationRequest, Sampling, TokenEvent

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the products were not built: there was no C compiler")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = [  # rows, heads that ask, heads of the cache, columns, width of a key, of a value
    (1, 4, 4, 1, 16, 16),
    (3, 8, 2, 77, 40, 24),
    (2, 12, 2, 130, 128, 128),
    (1, 7, 1, 33, 10, 3),
    (2, 9, 3, 21, 96, 72),
    (1, 10, 2, 8, 256, 160),
    (1, 2, 1, 15, 33, 65),
]
Cache = tuple[Tensor, Tensor, Tensor, Tensor]


def random_cache(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Cache:
    """Queries [B, A, 1, D], keys and values as views of a longer cache, a mask [B, 1, 1, S] that leaves the last."""
    rows, asking, heads, columns, width, value_width = shape
    made = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, asking, 1, width, generator=made).to(dtype)
    keys = torch.randn(rows + 1, heads, columns + 5, width, generator=made).to(dtype)[1:, :, :columns]
    values = torch.randn(rows + 1, heads, columns + 5, value_width, generator=made).to(dtype)[1:, :, :columns]
    mask = torch.rand(rows, 1, 1, columns, generator=made) > 0.4
    mask[..., -1] = True
    return q, keys, values, mask


def reference(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, A, V], in float64, a head at a time."""
    groups = q.shape[1] // keys.shape[1]
    heads = []
    for head in range(q.shape[1]):
        k, v = keys[:, head // groups].double(), values[:, head // groups].double()  # [B, S, D], [B, S, V]
        scores = torch.einsum("bd,bsd->bs", q[:, head, 0].double(), k) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0, 0], -torch.inf)
        heads.append(torch.einsum("bs,bsv->bv", scores.softmax(-1), v))
    return torch.stack(heads, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention_with_every_instruction_set(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for seed, name in enumerate(instruction_sets()):
        q, keys, values, mask = random_cache(shape, dtype, seed)
        assert attends(q, keys, values, mask)
        for seen in (mask, mask[:1].expand(len(q), -1, -1, -1), None):
            found = Products(name).attend(q[:, :, 0], keys, values, None if seen is None else seen[:, 0, 0], 0.3)
            wanted = reference(q, keys, values, seen, 0.3)
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sinks_take_their_share_of_the_weights(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same as one column more, whose score is the sink and whose value is nothing."""
    for seed, name in enumerate(instruction_sets()):
        q, keys, values, mask = random_cache(shape, dtype, seed)
        sinks = torch.randn(shape[1], generator=torch.Generator().manual_seed(seed)) * 2
        own = Products(name)
        for seen in (mask, None):
            narrow = None if seen is None else seen[:, 0, 0]
            found = own.attend(q[:, :, 0], keys, values, narrow, 0.3, sinks)
            groups, heads = shape[1] // shape[2], []
            for head in range(shape[1]):
                k, v = keys[:, head // groups].double(), values[:, head // groups].double()
                scores = torch.einsum("bd,bsd->bs", q[:, head, 0].double(), k) * 0.3
                scores = scores if seen is None else scores.masked_fill(~seen[:, 0, 0], -torch.inf)
                scores = torch.cat([scores, sinks[head].double().expand(len(q), 1)], 1)
                heads.append(torch.einsum("bs,bsv->bv", scores.softmax(-1)[:, :-1], v))
            torch.testing.assert_close(found.double(), torch.stack(heads, 1), rtol=0, atol=TOLERANCE[dtype])
            none = own.attend(q[:, :, 0], keys, values, narrow, 0.3, torch.full_like(sinks, -torch.inf))
            assert none.equal(own.attend(q[:, :, 0], keys, values, narrow, 0.3))


def test_a_family_with_sinks_answers_as_with_its_own_attention(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    """Two rows of unlike prompts, one of them longer than the window, in chunks."""
    folder = checkpoint("gpt_oss", sliding_window=24)
    requests = [
        GenerationRequest(tuple(range(5, end)), None, "exact", Sampling(max_tokens=7, ignore_eos=True))
        for end in (15, 75)
    ]
    answers = {}
    for kernel in ("torch", "own"):
        engine = open_engine(folder, kernel=kernel, chunk_tokens=32, max_context=128)
        expected = EAGER if kernel == "torch" else IMPLEMENTATION
        assert engine.passes._model.config._attn_implementation == expected
        answers[kernel] = [[] for _ in requests]
        for event in engine.generate(requests):
            if isinstance(event, TokenEvent):
                answers[kernel][event.row].append(event.token)
    assert answers["own"] == answers["torch"]
    assert [len(tokens) for tokens in answers["own"]] == [7, 7]


def test_a_family_whose_sinks_do_something_else_keeps_its_attention(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.gpt_oss import modeling_gpt_oss as modeling

    theirs = modeling.eager_attention_forward

    def louder(*arguments: Any, **named: Any) -> Any:
        found, weights = theirs(*arguments, **named)
        return found * 1.1, weights

    monkeypatch.setattr(modeling, "eager_attention_forward", louder)
    engine = open_engine(checkpoint("gpt_oss"))
    assert engine.passes._model.config._attn_implementation == EAGER


def test_columns_may_lie_apart() -> None:
    """DeepSeek's values are parts of wider ones."""
    q, keys, values, mask = random_cache((2, 4, 2, 19, 16, 40), torch.float32, 2)
    parts = keys.transpose(1, 2).contiguous().transpose(1, 2), values[..., 8:31]
    assert attends(q, *parts, mask)
    found = best().attend(q[:, :, 0], *parts, mask[:, 0, 0], 0.3)
    torch.testing.assert_close(found.double(), reference(q, *parts, mask, 0.3), rtol=0, atol=1e-5)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    q, keys, values, mask = random_cache((1, 2, 1, 50, 32, 32), torch.float32, 3)
    for factor in (1e-6, 30.0, 1e4):
        found = best().attend(q[:, :, 0] * factor, keys, values, mask[:, 0, 0], 1.0)
        torch.testing.assert_close(found.double(), reference(q * factor, keys, values, mask, 1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_are_its_own_whatever_stands_beside_and_before_it(dtype: torch.dtype) -> None:
    """Other rows, padding on the left with infinities in it, and threads change nothing."""
    q, keys, values, mask = random_cache((3, 8, 2, 90, 64, 64), dtype, 5)
    alone = best().attend(q[1:2, :, 0], keys[1:2], values[1:2], mask[1:2, 0, 0], 0.2)
    together = best().attend(q[:, :, 0], keys, values, mask[:, 0, 0], 0.2)
    assert torch.equal(together[1:2], alone)
    room = torch.full((1, 2, 13, 64), torch.inf, dtype=dtype)
    padded = [torch.cat([room, one[1:2]], 2) for one in (keys, values)]
    moved = best().attend(q[1:2, :, 0], *padded, F.pad(mask[1:2, 0, 0], (13, 0)), 0.2)
    assert torch.equal(moved, alone)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        wide = [torch.cat([one] * 40, 2) for one in (keys, values)]  # enough bytes to be worth a second thread
        assert torch.equal(best().attend(q[:, :, 0], *wide, None, 0.2)[1:2], on_one_thread(q[1:2], *wide))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", range(1, 10))
def test_a_heads_bits_are_its_own_however_many_share_its_keys(groups: int, dtype: torch.dtype) -> None:
    q, keys, values, _ = random_cache((1, groups, 1, 53, 72, 72), dtype, groups)
    together = best().attend(q[:, :, 0], keys, values, None, 0.2)
    for head in range(groups):
        assert torch.equal(together[:, head], best().attend(q[:, head], keys, values, None, 0.2)[:, 0])


def on_one_thread(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    torch.set_num_threads(1)
    return best().attend(q[:, :, 0], keys[1:2], values[1:2], None, 0.2)


def test_a_row_that_may_look_nowhere_gets_nothing() -> None:
    q, keys, values, mask = random_cache((2, 2, 1, 9, 16, 16), torch.float32, 6)
    mask[0] = False
    found = best().attend(q[:, :, 0], keys, values, mask[:, 0, 0], 1.0)
    assert not found[0].any()
    assert found[1].isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, m: (q.expand(-1, -1, 2, -1), k, v, m),
        lambda q, k, v, m: (q, k, v, torch.zeros(m.shape)),
        lambda q, k, v, m: (q, k, v, m.expand(-1, q.shape[1], -1, -1)),
        lambda q, k, v, m: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v, m),
        lambda q, k, v, m: (q.double(), k.double(), v.double(), m),
        lambda q, k, v, m: (q, k, v.to(torch.bfloat16), m),
    ],
    ids=["two tokens", "a mask of numbers", "a mask a head", "another layout", "float64", "mixed dtypes"],
)
def test_what_it_can_not_take_goes_to_torch(change: Callable[..., Cache]) -> None:
    q, keys, values, mask = random_cache((2, 4, 2, 11, 16, 16), torch.float32, 7)
    assert not attends(*change(q, keys, values, mask))


def test_it_answers_as_torch_does_where_transformers_calls_it() -> None:
    q, keys, values, mask = random_cache((2, 4, 2, 21, 16, 16), torch.float32, 8)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    wanted, _ = attend(module, q, keys, values, mask, scaling=0.25)
    setattr(module, OWN, best())
    found, _ = attend(module, q, keys, values, mask, scaling=0.25)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attend(module, q, keys, values, mask)[0], found, rtol=1e-5, atol=1e-6)  # width ** -0.5


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe_lite", "afmoe"])
def test_every_new_token_is_attended_by_it_where_the_rest_of_attention_is_the_models_own(
    family: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    theirs = Products.attend

    def counted(self: Products, *arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return theirs(self, *arguments)

    monkeypatch.setattr(Products, "attend", counted)
    answers = {}
    for kernel in ("torch", "own"):
        engine = open_engine(checkpoint(family), kernel=kernel)
        assert calls < 7, "more than trials"
        calls = 0
        request = GenerationRequest(tuple(range(40, 60)), None, "exact", Sampling(max_tokens=7, ignore_eos=True))
        answers[kernel] = [event.text for event in engine.generate([request])][-1]
    layers = engine.passes._model.config.num_hidden_layers
    assert calls == 6 * layers  # the first token comes from the prompt's pass; with torch's kernel none
    assert answers["own"] == answers["torch"]
    assert engine.passes._model.config._attn_implementation == IMPLEMENTATION


def best() -> Products:
    return Products(next(iter(instruction_sets())))
