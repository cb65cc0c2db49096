"""The gated delta rule by our own products, against itself in plain Python and against transformers' functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from engine.delta_rule import LEAST, delta_rule
from engine.engine import Engine
from engine.products import Products

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

ROWS, KEY_HEADS, HEADS = 2, 2, 4


def _draw(tokens: int, keys: int, values: int, each: bool, dtype: torch.dtype = torch.float32) -> Inputs:
    """q, k, v, g, beta and a state; as in a model, q, k and v lie in one tensor."""
    mixed = torch.randn(ROWS, tokens, 2 * KEY_HEADS * keys + HEADS * values).to(dtype)
    q, k, v = mixed.split([KEY_HEADS * keys, KEY_HEADS * keys, HEADS * values], -1)
    g = -3 * torch.rand((ROWS, tokens, HEADS, keys) if each else (ROWS, tokens, HEADS))
    beta, state = torch.rand(ROWS, tokens, HEADS).to(dtype), torch.randn(ROWS, HEADS, keys, values)
    shape = (ROWS, tokens, -1, keys)
    return q.view(shape), k.view(shape), v.view(ROWS, tokens, HEADS, values), g, beta, state


def _slow(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Number by number, in float64."""
    q, k, v, g, beta, state = (each.double() for each in inputs)
    state, out = state.clone(), torch.zeros_like(v)
    for row in range(ROWS):
        for head in range(HEADS):
            s, shared = state[row, head], head // (HEADS // KEY_HEADS)  # [D, V]
            for token in range(q.shape[1]):
                query, key = (
                    one / (one @ one + LEAST).sqrt() for one in (q[row, token, shared], k[row, token, shared])
                )
                s *= g[row, token, head].exp().reshape(-1, 1)
                s += torch.outer(key, beta[row, token, head] * (v[row, token, head] - key @ s))
                out[row, token, head] = query @ s / len(query) ** 0.5
    return out, state


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("keys", "values"), [(8, 8), (5, 19), (16, 83), (128, 128)])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_it_is_the_rule_number_by_number(own: Products, tokens: int, keys: int, values: int, each: bool) -> None:
    inputs = _draw(tokens, keys, values, each)
    wanted, left = _slow(inputs)
    state = inputs[5].clone()
    torch.testing.assert_close(own.delta(*inputs[:5], state, LEAST).double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.double(), left, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("each", [False, True])
def test_bfloat16_goes_in_and_comes_out_and_sums_are_float32(own: Products, each: bool) -> None:
    inputs = _draw(9, 16, 40, each, torch.bfloat16)
    wanted, left = _slow(inputs)
    state = inputs[5].clone()
    found = own.delta(*inputs[:5], state, LEAST)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-4)
    torch.testing.assert_close(state.double(), left, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 31, 32, 50])
def test_a_row_is_the_same_to_the_bit_however_its_tokens_are_cut_beside_whomever_on_any_number_of_threads(
    own: Products, cut: int, threads: Callable[[int], None]
) -> None:
    q, k, v, g, beta, state = _draw(70, 16, 48, each=False)
    whole = state.clone()
    threads(2)
    wanted = own.delta(q, k, v, g, beta, whole, LEAST)
    threads(1)
    alone = state[1:].clone()
    first, second = (
        own.delta(q[1:, part], k[1:, part], v[1:, part], g[1:, part], beta[1:, part], alone, LEAST)
        for part in (slice(0, cut), slice(cut, 70))
    )
    assert torch.cat([first, second], 1).equal(wanted[1:])
    assert alone.equal(whole[1:])


RULES = [
    qwen.torch_recurrent_gated_delta_rule,
    qwen.torch_chunk_gated_delta_rule,
    kimi.recurrent_kimi_delta_attention,
    kimi.chunk_kimi_delta_attention,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_transformers_functions_of_the_rule_are_recognised(own: Products, rule: Callable[..., object]) -> None:
    assert delta_rule(own).agrees(rule)


def test_a_function_that_takes_the_same_and_does_something_else_is_not(own: Products) -> None:
    def without_decay(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **rest: object) -> object:
        return qwen.torch_recurrent_gated_delta_rule(query, key, value, g=0 * g, beta=beta, **rest)

    def scaled(query: Tensor, key: Tensor, value: Tensor, **rest: object) -> object:
        out, state = qwen.torch_recurrent_gated_delta_rule(query, key, value, **rest)
        return 1.01 * out, state

    assert not delta_rule(own).agrees(without_decay)
    assert not delta_rule(own).agrees(scaled)


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe", "kimi_linear", "bailing_hybrid"])
def test_layers_of_linear_attention_call_it_and_transformers_own_stay_as_they_were(
    kind: str, checkpoint: Checkpoint, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    delta = Products.delta

    def counted(own: Products, q: Tensor, *rest: Tensor) -> Tensor:
        called.append(q.shape[1])
        return delta(own, q, *rest)

    engine = open_engine(checkpoint(kind))
    monkeypatch.setattr(Products, "delta", counted)
    ids = torch.arange(5).unsqueeze(0)
    ours = engine.forward(ids, torch.ones_like(ids), [None])
    assert called == [5, 5]
    monkeypatch.undo()
    plain = open_engine(checkpoint(kind), kernel="torch")
    # Heads answer with numbers near zero, which the norm behind them makes large, rounding and all.
    torch.testing.assert_close(ours, plain.forward(ids, torch.ones_like(ids), [None]), rtol=0, atol=5e-3)
